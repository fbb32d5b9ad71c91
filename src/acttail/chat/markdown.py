"""Markdown as it comes: which blocks of an unfinished answer are finished, and how a block looks."""

from itertools import pairwise
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.syntax import Syntax

# A model's HTML is text to be shown, not to be left out.
_PARSER = (
    MarkdownIt("commonmark")
    .enable(["strikethrough", "table"])
    .disable(["html_block", "html_inline"])
)


class _Heading(Heading):
    """A heading where reading begins: rich centres those of the first order."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Code(CodeBlock):
    """Code without empty lines around it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(
            str(self.text).rstrip(), self.lexer_name, theme=self.theme, word_wrap=True, padding=(0, 2),
            background_color="default",
        )  # fmt: skip


class Block(Markdown):
    """A renderable of Markdown in which line breaks stay line breaks and links show where they lead.

    Args:
        text: Markdown, clean.
    """

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
    }

    def __init__(self, text: str) -> None:
        # ansi_dark takes the terminal's own colours and background.
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.markup, self.parsed = text, _PARSER.parse(text)
        _keep_breaks(self.parsed)


def _keep_breaks(tokens: list[Any]) -> None:
    for token in tokens:
        if token.type == "softbreak":
            token.type = "hardbreak"
        _keep_breaks(token.children or [])


def split(text: str) -> tuple[list[str], str]:
    """Blocks at the beginning of a text that nothing which may follow can change, and the rest.

    Args:
        text: an answer so far.
    """
    # A line that is not complete may yet turn out to belong to the block before it.
    whole = text[: text.rfind("\n") + 1]
    starts = [t.map[0] for t in _PARSER.parse(whole) if t.level == 0 and t.map and t.nesting >= 0]
    if len(starts) < 2:
        return [], text
    lines = text.split("\n")
    cuts = [0, *starts[1:]]
    blocks = ["\n".join(lines[a:b]).strip("\n") for a, b in pairwise(cuts)]
    return blocks, "\n".join(lines[cuts[-1] :])

"""Text that a terminal may be given: without escape sequences and other control characters."""

import re

# ECMA-48: a control sequence, a control string up to its end, any other escape, and the one-character forms of the
# first two. A string ends at its line at the latest: one that was never closed must not swallow the rest.
_SEQUENCE = (
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c|(?=\n))"
    r"|\x1b[ -/]*[0-OQ-WYZ\\`-~]"
)
_WHOLE = re.compile(_SEQUENCE)
# What is left: control characters but newline and tab, and the marks that turn the direction of a line.
_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
_DROPPED = re.compile(f"{_SEQUENCE}|{_CONTROL}")
# A sequence that has begun and not ended; longer ones are no sequences of any terminal.
_BEGUN = re.compile(r"(?:\x1b[^\n]{0,256}|[\x90\x98\x9b\x9d-\x9f][^\n]{0,256})\Z")


class Cleaner:
    """Cleans text that comes in pieces, which may break in the middle of a sequence."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        """What is known to be clean by now.

        Args:
            text: the next piece.
        """
        text = _WHOLE.sub("", self._held + text)
        begun = _BEGUN.search(text)
        self._held = begun.group() if begun else ""
        return _DROPPED.sub("", text[: len(text) - len(self._held)])

    def finish(self) -> str:
        """What was held back."""
        rest, self._held = _DROPPED.sub("", self._held), ""
        return rest


def clean(text: str) -> str:
    """A whole text, such as a name, without escape sequences and control characters."""
    return _DROPPED.sub("", text)

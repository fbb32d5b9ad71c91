"""The exceptions acttail raises on bad input: one clear line each, naming the thing and the remedy.

The command line prints that line and exits with status 2; a library user catches
:class:`ActTailError` or one of its children.
"""

# Of a line longer than both, the thing and the remedy.
_BEGIN, _END = 1200, 300


class ActTailError(Exception):
    """Base of every error that acttail raises on purpose; its text is one line, whatever names it quotes."""

    def __str__(self) -> str:
        # Files hold names, and libraries say things, with line ends and with a terminal's own commands.
        line = " ".join(super().__str__().split())
        if not line.isprintable():
            line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        if len(line) > _BEGIN + _END:
            line = f"{line[:_BEGIN]} ... {line[-_END:]}"
        return line


class ModelError(ActTailError):
    """A model is unknown, unreadable, truncated or not a decoder."""


class PlanError(ActTailError):
    """A plan is malformed, of an unknown version, or made for another model."""


class BudgetError(ActTailError):
    """A requested sparsity cannot be met."""


class SpectrumError(ActTailError):
    """A matrix has no usable spectrum."""


class TextError(ActTailError):
    """A text cannot be found, is empty, or is shorter than one window."""


class ActTailWarning(UserWarning):
    """A result is usable but something about it should be known."""


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type: what fits in one line for a user."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__

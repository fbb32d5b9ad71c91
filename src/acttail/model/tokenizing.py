"""Asking a model's tokenizer: its files are data, and may be wrong in any way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError

from acttail.errors import ActTailError, reason


@contextmanager
def asking(tokenizer: Any) -> Iterator[None]:
    """Inside, whatever the tokenizer or its chat template raises is one line.

    Args:
        tokenizer: of transformers, or None.

    Raises:
        ActTailError: there is none, or it raised something.
    """
    if tokenizer is None:
        raise ActTailError("this engine has no tokenizer: give token ids")
    try:
        yield
    except ActTailError:
        raise
    except TemplateError as error:
        raise ActTailError(f"the chat template refuses the messages: {error}") from error
    except Exception as error:
        raise ActTailError(
            f"the model's tokenizer fails ({type(error).__name__}: {reason(error)}); fetch the model again"
        ) from error

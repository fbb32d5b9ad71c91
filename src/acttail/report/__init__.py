"""Self-contained HTML pages: no network, no script needed to read them.

Nothing is imported here but when asked for: the terminal's heat map needs none of it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acttail.report.page import Report, render

__all__ = ["Report", "render"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from acttail.report import page

        return getattr(page, name)
    raise AttributeError(f"module 'acttail.report' has no attribute {name!r}")

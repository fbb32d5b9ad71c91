"""Self-contained HTML pages: no network, no script needed to read them."""

from acttail.report.comparison import comparison_page

__all__ = ["comparison_page"]

"""acttail: faster decoding of large language models by activation sparsity.

>>> import acttail
>>> model, tokenizer = acttail.load("smollm2-135m")  # doctest: +SKIP
>>> plan = acttail.make_plan(model, sparsity=0.5)  # doctest: +SKIP
>>> acttail.sparsify_(model, plan)  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from acttail._register import lend_readers, register_when_imported
from acttail._version import __version__

if TYPE_CHECKING:
    from acttail.allocate import make_plan
    from acttail.evaluate.perplexity import perplexity
    from acttail.model.load import load
    from acttail.plan import SparsityPlan
    from acttail.sparse.apply import densify_, sparsify_
    from acttail.spectrum.analysis import analyze

__all__ = [
    "SparsityPlan",
    "__version__",
    "analyze",
    "densify_",
    "load",
    "make_plan",
    "perplexity",
    "sparsify_",
]

_HOMES = {
    "SparsityPlan": "acttail.plan",
    "analyze": "acttail.spectrum.analysis",
    "densify_": "acttail.sparse.apply",
    "load": "acttail.model.load",
    "make_plan": "acttail.allocate",
    "perplexity": "acttail.evaluate.perplexity",
    "sparsify_": "acttail.sparse.apply",
}


def __getattr__(name: str) -> Any:
    """Import public names when first used, so that `import acttail` stays cheap (PEP 562)."""
    if name in _HOMES:
        import importlib

        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'acttail' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_imported()
lend_readers()

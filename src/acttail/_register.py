"""What lower rooms are lent by higher ones, and transformers by us, without importing any of it before it is used.

`import acttail` must stay cheap, so it does not import transformers; but a sparse checkpoint must
load with plain `AutoModelForCausalLM.from_pretrained` after it.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from acttail.model.hf import QUANTIZER_REGISTRY
from acttail.model.names import PackedSource


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets the registry of transformers load as usual, then adds acttail to it."""

    def __init__(self) -> None:
        self._loader: importlib.abc.Loader | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != QUANTIZER_REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec) if self._loader else None

    def exec_module(self, module: ModuleType) -> None:
        if self._loader is not None:
            self._loader.exec_module(module)
            importlib.import_module("acttail.sparse.hf_plugin")


def register_when_imported() -> None:
    """Register now if transformers' registry is loaded, else right after it loads."""
    if QUANTIZER_REGISTRY in sys.modules:
        importlib.import_module("acttail.sparse.hf_plugin")
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def lend_readers() -> None:
    """Let the room of models read what the engine packed."""

    def packed(source: PackedSource) -> Any:
        room = importlib.import_module("acttail.engine.packed_weights")
        return room.PackedWeights(source.name, source.path)

    PackedSource.reader = staticmethod(packed)

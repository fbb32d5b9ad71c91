"""Where packed weights live: one arena of huge pages in memory, or an .acttail folder on disk."""

import json
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from acttail.engine.layout import Shape
from acttail.engine.spec import DecoderSpec
from acttail.errors import ActTailError
from acttail.files import replacing, write_json
from acttail.plan import SparsityPlan

VERSION = 1
_SAFETENSORS = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}
_TORCH = {name: dtype for dtype, name in _SAFETENSORS.items()}
# Rows start on cache lines; the arena itself on a huge page.
_ALIGN = 64
_READ_BYTES = 32 << 20


@dataclass(frozen=True)
class Segment:
    """One projection's columns in a fused matrix.

    Attributes:
        name: the projection's.
        kind: its kind.
        begin: first column.
        end: one past its last, padded to blocks.
        d_out: outputs, without the padding.
    """

    name: str
    kind: str
    begin: int
    end: int
    d_out: int


@dataclass(frozen=True)
class Layout:
    """What a packed model consists of, without the bytes.

    Attributes:
        spec: the decoder.
        dtype: of the projections.
        head_dtype: of the embedding and the output head.
        source: name of the model it was made from.
        shapes: matrix name -> its shape; ``blocks.3.qkv``, ``embedding``, ``head``.
        segments: fused matrix name -> its projections, in the order of their columns.
    """

    spec: DecoderSpec
    dtype: str
    head_dtype: str
    source: str
    shapes: dict[str, Shape]
    segments: dict[str, tuple[Segment, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self) | {"version": VERSION}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Layout":
        """Read what :meth:`to_dict` made.

        Raises:
            ActTailError: another version, or not such data.
        """
        if data.get("version") != VERSION:
            raise ActTailError(
                f"engine weights of version {data.get('version')!r} are not known to this acttail "
                f"(it reads version {VERSION}); convert the model again"
            )
        try:
            return cls(
                DecoderSpec.from_dict(data["spec"]), data["dtype"], data["head_dtype"], data["source"],
                {name: Shape(**shape) for name, shape in data["shapes"].items()},
                {name: tuple(Segment(**s) for s in found) for name, found in data["segments"].items()},
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise ActTailError(
                f"the engine's description is damaged ({error}); convert again"
            ) from error


@dataclass
class Packed:
    """A packed model in memory.

    Attributes:
        layout: what it consists of.
        tensors: name -> tensor, all in one arena.
        plan: the plan it was converted with, if any.
    """

    layout: Layout
    tensors: dict[str, torch.Tensor]
    plan: SparsityPlan | None = None
    arena: Any = field(default=None, repr=False)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def matrix(self, name: str) -> dict[str, torch.Tensor]:
        """Suffix -> tensor of one packed matrix."""
        return {s: self.tensors[f"{name}.{s}"] for s in self.layout.shapes[name].tensors()}


Sizes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def _bytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count = dtype.itemsize
    for n in shape:
        count *= n
    return count


def _view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor, in place."""
    array: Any = tensor.reshape(-1).numpy()
    return memoryview(array)


def allocate(sizes: Sizes) -> tuple[dict[str, torch.Tensor], Any]:
    """Uninitialised tensors of these dtypes and shapes in one arena, on huge pages where the system has them.

    Huge pages are worth 1.3-1.5 times the bandwidth of ordinary ones (benchmarks/bandwidth.csv).
    """
    offsets, total = {}, 0
    for name, (dtype, shape) in sizes.items():
        offsets[name] = total
        total += -(-_bytes_of(dtype, shape) // _ALIGN) * _ALIGN
    huge = 2 << 20
    size = max(total, 1) + 2 * huge
    if hasattr(mmap, "MAP_PRIVATE"):
        # Python's default is a shared mapping, which gets no huge pages.
        arena = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        arena = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        arena.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(arena, dtype=torch.uint8)
    start = -whole.data_ptr() % huge
    tensors = {
        name: whole[start + offsets[name] : start + offsets[name] + _bytes_of(dtype, shape)]
        .view(dtype)
        .reshape(shape)
        for name, (dtype, shape) in sizes.items()
    }
    return tensors, arena


def write_folder(
    folder: Path,
    layout: Layout,
    sizes: Sizes,
    produce: Callable[[], Iterator[tuple[str, torch.Tensor]]],
    plan: SparsityPlan | None,
) -> None:
    """Write an .acttail folder, one tensor in memory at a time.

    Args:
        folder: made if absent; its files are replaced whole.
        layout: what is written.
        sizes: name -> (dtype, shape) of every tensor, in the order of the file.
        produce: yields (name, tensor) in that order.
        plan: kept beside the weights.

    Raises:
        ActTailError: the folder cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "acttail-engine"}}
    offset = 0
    for name, (dtype, shape) in sizes.items():
        size = _bytes_of(dtype, shape)
        header[name] = {
            "dtype": _SAFETENSORS[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ActTailError(f"cannot write {folder}: {error.strerror}") from error
    # The description goes last: without it the folder is not taken for a model.
    description = folder / "engine.json"
    description.unlink(missing_ok=True)
    with replacing(folder / "weights.safetensors") as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for (name, tensor), expected in zip(produce(), sizes, strict=True):
            if name != expected or (tensor.dtype, tuple(tensor.shape)) != sizes[name]:
                raise ActTailError(f"the conversion produced {name} where {expected} was due")
            file.write(_view(tensor.contiguous().reshape(-1).view(torch.uint8)))
    write_json(description, layout.to_dict() | {"plan": plan.to_dict() if plan else None})


def is_folder(path: Path) -> bool:
    """Whether this is an .acttail folder."""
    return (path / "engine.json").is_file() and (path / "weights.safetensors").is_file()


def read_folder(folder: Path) -> Packed:
    """Load an .acttail folder into an arena (0.1 s for 270 MB in the page cache).

    Raises:
        ActTailError: not such a folder, damaged, or truncated.
    """
    try:
        data = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
        path = folder / "weights.safetensors"
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100 << 20)))
    except (OSError, ValueError, struct.error) as error:
        raise ActTailError(f"cannot read {folder}: {error}; convert the model again") from error
    if not isinstance(data, dict):
        raise ActTailError(f"cannot read {folder}: engine.json is not an object")
    saved = data.pop("plan", None)
    layout = Layout.from_dict(data)
    header.pop("__metadata__", None)
    start = 8 + length
    sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, entry in header.items():
        sizes[name] = _TORCH[entry["dtype"]], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        if last - first != _bytes_of(*sizes[name]) or start + last > size:
            raise ActTailError(f"{path} is truncated at {name}; convert the model again")
    tensors, arena = allocate(sizes)
    pieces = []
    for name, entry in header.items():
        target = tensors[name].view(torch.uint8).reshape(-1)
        for at in range(0, target.numel(), _READ_BYTES):
            pieces.append((start + entry["data_offsets"][0] + at, target[at : at + _READ_BYTES]))

    def read(piece: tuple[int, torch.Tensor]) -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(piece[0])
            view = _view(piece[1])
            while view:
                count = file.readinto(view)
                if not count:
                    raise ActTailError(f"{path} is truncated; convert the model again")
                view = view[count:]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, pieces))
    plan = SparsityPlan.from_dict(saved) if saved else None
    return Packed(layout, tensors, plan, arena)

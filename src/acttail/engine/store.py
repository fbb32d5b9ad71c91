"""Where packed weights live: one arena of huge pages in memory, or an .acttail folder on disk."""

import json
import mmap
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Len

from acttail.base.files import replacing, write_json
from acttail.base.schema import STRICT, Count, Name, SchemaError, checked, parse, read_json
from acttail.engine.description import read_layout
from acttail.engine.layout import Layout, Sizes
from acttail.errors import ActTailError
from acttail.plan import SparsityPlan
from acttail.sparse.policy import PrefillPolicy

_SAFETENSORS = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}
_TORCH = {name: dtype for dtype, name in _SAFETENSORS.items()}
# Rows start on cache lines; the arena itself on a huge page.
_ALIGN = 64
_READ_BYTES = 32 << 20
# safetensors' own bound.
_HEADER_BYTES = 100 << 20


@dataclass
class Packed:
    """A packed model in memory.

    Attributes:
        layout: what it consists of.
        tensors: name -> tensor, all in one arena.
        plan: the plan it was converted with, if any.
        policy: the prefill policy it was converted with.
    """

    layout: Layout
    tensors: dict[str, torch.Tensor]
    plan: SparsityPlan | None = None
    arena: Any = field(default=None, repr=False)
    policy: PrefillPolicy = field(default_factory=PrefillPolicy)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def matrix(self, name: str) -> dict[str, torch.Tensor]:
        """Suffix -> tensor of one packed matrix."""
        return {s: self.tensors[f"{name}.{s}"] for s in self.layout.shapes[name].tensors()}


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
    policy: PrefillPolicy,
) -> None:
    """Write an .acttail folder, one tensor in memory at a time.

    Args:
        folder: made if absent; its files are replaced whole.
        layout: what is written.
        sizes: name -> (dtype, shape) of every tensor, in the order of the file.
        produce: yields (name, tensor) in that order.
        plan: kept beside the weights.
        policy: which tokens of a prompt are sparse; kept too.

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
    carried = {"plan": plan.to_dict() if plan else None, "prefill": str(policy)}
    write_json(description, layout.to_dict() | carried)


def write_packed(folder: Path, packed: Packed) -> None:
    """Write a packed model that is in memory as an .acttail folder.

    Args:
        folder: made if absent.
        packed: the model.

    Raises:
        ActTailError: the folder cannot be written.
    """
    sizes = {name: (t.dtype, tuple(t.shape)) for name, t in packed.tensors.items()}
    write_folder(
        folder,
        packed.layout,
        sizes,
        lambda: iter(packed.tensors.items()),
        packed.plan,
        packed.policy,
    )


@dataclass(frozen=True)
class Description:
    """What an .acttail folder says of itself.

    Attributes:
        layout: of its weights.
        plan: kept beside them, None for none.
        policy: the prefill policy kept beside them.
    """

    layout: Layout
    plan: SparsityPlan | None
    policy: PrefillPolicy


def read_description(folder: Path) -> Description:
    """Read what a folder holds beside its weights.

    Raises:
        ActTailError: not such a folder, damaged, or of another version.
    """
    try:
        data = read_json(folder / "engine.json", "an engine's description")
        if not isinstance(data, dict):
            raise ActTailError("engine.json is not an object")  # noqa: TRY301
        saved = data.pop("plan", None)
        # Folders of before the policy was kept have none.
        policy = PrefillPolicy.parse(str(data.pop("prefill", "all")))
        layout = read_layout(data)
        plan = SparsityPlan.from_dict(saved) if saved is not None else None
    except ActTailError as error:
        raise ActTailError(f"cannot read {folder}: {error}") from error
    return Description(layout, plan, policy)


def read_folder(folder: Path) -> Packed:
    """Load an .acttail folder into an arena (0.1 s for 270 MB in the page cache).

    Raises:
        ActTailError: not such a folder, damaged, or truncated.
    """
    described = read_description(folder)
    try:
        path = folder / "weights.safetensors"
        start, places = _places(path)
    except (ActTailError, OSError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ActTailError(f"cannot read {folder}: {why}") from error
    layout = described.layout
    biased = {stage.name for stage in layout.stages if f"{stage.name}.bias" in places}
    sizes = layout.sizes(biased)
    _check_places(path, sizes, places)
    try:
        tensors, arena = allocate(sizes)
    except (OSError, OverflowError, ValueError) as error:
        total = sum(_bytes_of(*size) for size in sizes.values())
        raise ActTailError(f"no memory for the {total / 1e9:,.1f} GB of {folder}") from error
    pieces = []
    for name, first in places.items():
        target = tensors[name].view(torch.uint8).reshape(-1)
        for at in range(0, target.numel(), _READ_BYTES):
            pieces.append((start + first[0] + at, target[at : at + _READ_BYTES]))

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
    return Packed(described.layout, tensors, described.plan, arena, described.policy)


@dataclass(frozen=True)
class _Entry:
    """A tensor in the header of a safetensors file; the annotations are its schema."""

    __pydantic_config__ = STRICT

    dtype: Literal["U8", "F16", "F32"]
    shape: Annotated[tuple[Count, ...], Len(1, 2)]
    data_offsets: tuple[Count, Count]


Places = dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]]


def _places(path: Path) -> tuple[int, Places]:
    """Where the data of a safetensors file begins, and tensor -> (first byte, one past its last, dtype, shape).

    Raises:
        ActTailError: it is no such file, or its tensors overlap, leave gaps or reach beyond its end.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, _HEADER_BYTES):
            raise ActTailError(
                f"{path.name} is truncated or no safetensors; convert the model again"
            )
        try:
            header = parse(file.read(length))
            if isinstance(header, dict):
                header.pop("__metadata__", None)
            entries = checked(dict[Name, _Entry], header)
        except SchemaError as error:
            raise ActTailError(
                f"{path.name} is no safetensors: {error}; convert the model again"
            ) from None
    found: Places = {
        name: (*e.data_offsets, _TORCH[e.dtype], e.shape) for name, e in entries.items()
    }
    at = 0
    for name, (first, last, dtype, shape) in sorted(found.items(), key=lambda item: item[1][:2]):
        if first != at or last - first != _bytes_of(dtype, shape):
            raise ActTailError(f"{path.name} is damaged at {name}; convert the model again")
        if 8 + length + last > size:
            raise ActTailError(f"{path.name} is truncated at {name}; convert the model again")
        at = last
    return 8 + length, found


def _check_places(path: Path, sizes: Sizes, places: Places) -> None:
    """What is there is what the description says, no more and no less."""
    missing = next((name for name in sizes if name not in places), None)
    strange = next((name for name in places if name not in sizes), None)
    if missing or strange:
        what = f"lacks {missing}" if missing else f"holds {strange}, which nothing reads"
        raise ActTailError(f"{path} {what}; convert the model again")
    for name, (dtype, shape) in sizes.items():
        if places[name][2:] != (dtype, shape):
            raise ActTailError(
                f"{name} in {path} has shape {list(places[name][3])} of {places[name][2]}, not {list(shape)} of "
                f"{dtype}; convert the model again"
            )

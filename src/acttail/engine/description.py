"""Reading an .acttail folder's description: nothing of it is used that does not follow from the rest.

The schema says what each number may be; here it is asked whether they belong together: which matrices there must
be, and how large, follows from the decoder; where each projection lies, from the order and widths of its stage.
Native code checks once more what it is given (native/check.cpp).
"""

from typing import Any, NoReturn

from acttail.base.schema import SchemaError, checked
from acttail.engine.blocks import padded
from acttail.engine.families import FAMILIES, Family
from acttail.engine.families.family import EXPERT
from acttail.engine.formats import stored_format
from acttail.engine.layout import EMBEDDING, HEAD_MATRIX, READ, Layout, Segment, Stage
from acttail.engine.shapes import Shape
from acttail.engine.spec import RECTIFIED, DecoderSpec, ExpertsSpec
from acttail.errors import ActTailError
from acttail.model.projections import HEAD


def read_layout(data: dict[str, Any]) -> Layout:
    """Read what :meth:`Layout.to_dict` made.

    Args:
        data: of a JSON file.

    Raises:
        ActTailError: another version, or a description of nothing that could be; names the first fault.
    """
    version = data.get("version")
    if version not in READ:
        raise ActTailError(
            f"engine weights of version {version!r} are not known to this acttail "
            f"(it reads versions {', '.join(map(str, READ))}); convert the model again"
        )
    try:
        layout = checked(Layout, {key: value for key, value in data.items() if key != "version"})
    except SchemaError as error:
        _refuse(str(error))
    _check_spec(layout.spec)
    for name in (layout.dtype, layout.head_dtype):
        stored_format(name)
    for name, shape in layout.shapes.items():
        _check_shape(name, shape)
    _check_stages(layout)
    _check_tables(layout)
    return layout


def _refuse(what: str) -> NoReturn:
    raise ActTailError(f"the engine's description is damaged: {what}; convert the model again")


def _check_spec(spec: DecoderSpec) -> None:
    family = FAMILIES.get(spec.family)
    if family is None:
        _refuse(f"it is of the family {spec.family!r}, which the engine does not run")
    if spec.heads % spec.kv_heads:
        _refuse(f"{spec.heads} heads share {spec.kv_heads} keys")
    if spec.layer_norm != family.layer_norm:
        _refuse(f"its norms are not those of {spec.family}")
    if (spec.positions is None) != (family.positions is None) or spec.parallel != family.parallel:
        _refuse(f"its blocks are not those of {spec.family}")
    for frequencies, _ in spec.ropes:
        if len(frequencies) > spec.head_dim // 2:
            _refuse(f"{len(frequencies)} frequencies turn heads of {spec.head_dim}")
    # Of what each block says of itself; an older folder's says nothing, and has MLPs of one width.
    inside = [n for b in spec.blocks for n in (b.inner, b.experts and b.experts.inner) if n]
    if inside and max(inside) != spec.intermediate:
        _refuse(f"its widest MLP has {max(inside)} features inside, not {spec.intermediate}")
    plain = family.positions is not None or family.turned is not None
    strange = next((role for role in spec.rectified if role not in RECTIFIED), None)
    if strange is not None:
        _refuse(f"ReLU follows its {strange}")
    for i, block in enumerate(spec.blocks):
        kinds = family.projections if block.experts is None else family.beside_experts
        if set(block.projections) != kinds:
            _refuse(f"block {i} has the projections {', '.join(sorted(block.projections))}")
        if block.experts is not None:
            _check_experts(spec, family, i, block.experts)
        if set(block.norms) != set(family.norms):
            _refuse(f"block {i} has the norms {', '.join(sorted(block.norms))}")
        if block.rope >= len(spec.ropes) or (block.rope < 0 and not plain):
            _refuse(f"block {i} wants rope table {block.rope} of {len(spec.ropes)}")


def _check_experts(spec: DecoderSpec, family: Family, block: int, experts: ExpertsSpec) -> None:
    routing, count = family.routing, len(experts.projections)
    if routing is None:
        _refuse(f"block {block} has experts, and blocks of {spec.family} have none")
    if experts.active > count:
        _refuse(f"a token visits {experts.active} of the {count} experts of block {block}")
    if (experts.shared_gate is not None) != routing.shared:
        _refuse(f"the experts of block {block} are not those of {spec.family}")
    stacks = {kind: name.rpartition(".")[0] for kind, name in experts.projections[0].items()}
    for e, own in enumerate(experts.projections):
        if set(own) != EXPERT:
            _refuse(
                f"an expert of block {block} has not the projections {', '.join(sorted(EXPERT))}"
            )
        if own != {kind: f"{stack}.{e}" for kind, stack in stacks.items()} or not all(
            "." in stack for stack in stacks.values()
        ):
            _refuse(f"expert {e} of block {block} is not named as a part of the others' parameters")


def _check_shape(name: str, shape: Shape) -> None:
    form = stored_format(shape.dtype)
    whole = shape.columns if shape.output_major else shape.rows
    fixed = form.fixed_group
    if fixed is not None:
        whole_blocks = shape.rows % fixed == 0 or form.fitted
        grouped = shape.group == fixed and whole_blocks and not shape.output_major
    elif form.group is None:
        grouped = shape.group == 0
    else:
        grouped = shape.group == whole or (0 < shape.group < whole and shape.group % 32 == 0)
    minimum = form.minimum if fixed is not None else shape.asymmetric and form.minimum
    if not grouped or shape.asymmetric != minimum or shape.columns % form.columns:
        _refuse(f"{name} is no matrix of the format {shape.dtype}")


def _d_out(spec: DecoderSpec, kind: str, inner: int) -> int:
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    wide = {
        "q": q, "k": kv, "v": kv, "qkv": q + 2 * kv, "gate": inner, "up": inner, "gate_up": 2 * inner,
        "fc1": inner,
    }  # fmt: skip
    return wide.get(kind, spec.hidden)


def _check_stages(layout: Layout) -> None:
    """Every stage's matrices hold its block's projections, one after the other, and there are no others."""
    spec, known = layout.spec, set[str]()
    for stage in layout.stages:
        names = layout.matrices(stage.name)
        known |= set(names)
        there: list[Segment] = []
        for name in names:
            _check_matrix(layout, name, stage.d_in)
            there += layout.segments[name]
        _check_members(spec, stage, there)
    if HEAD_MATRIX in layout.segments:
        known.add(HEAD_MATRIX)
        _check_matrix(layout, HEAD_MATRIX, spec.hidden)
        members = layout.segments[HEAD_MATRIX]
        if [(s.kind, s.d_out) for s in members] != [(HEAD, spec.vocabulary)]:
            _refuse("its head is no output head of this vocabulary")
    strange = next((name for name in layout.segments if name not in known), None)
    if strange is not None:
        _refuse(f"it has {strange}, which is in no block")
    strange = next((n for n in layout.shapes if n not in known | {HEAD_MATRIX, EMBEDDING}), None)
    if strange is not None:
        _refuse(f"it has {strange}, which nothing reads")


def _check_matrix(layout: Layout, name: str, d_in: int) -> None:
    """An input-major matrix, whose segments fill it."""
    shape, segments = layout.shapes.get(name), layout.segments.get(name)
    if shape is None or not segments:
        _refuse(f"it lacks {name}")
    if shape.output_major or shape.rows != d_in:
        _refuse(f"{name} has {shape.rows} rows, not {d_in}")
    at = 0
    for s in segments:
        if s.begin != at or s.end != at + padded(s.d_out, shape.format.columns):
            _refuse(f"{s.name} lies in columns {s.begin} to {s.end} of {name}, not from {at} on")
        at = s.end
    if at != shape.columns:
        _refuse(f"{name} has {shape.columns} columns, of which {at} are filled")


def _check_members(spec: DecoderSpec, stage: Stage, there: list[Segment]) -> None:
    wanted = sorted(
        (kind, name, _d_out(spec, kind, stage.inner)) for kind, name in stage.members.items()
    )
    found = sorted((s.kind, s.name, s.d_out) for s in there)
    if found != wanted:
        _refuse(f"{stage.name} does not hold the projections of its block, each with its outputs")


def _check_tables(layout: Layout) -> None:
    """The embedding, unless it is tied to a head that is input-major, and a head of its own that is kept by outputs."""
    spec = layout.spec
    tables = {EMBEDDING} | ({HEAD_MATRIX} & layout.shapes.keys()) - layout.segments.keys()
    if layout.gathered and spec.head == spec.embedding and HEAD_MATRIX in layout.segments:
        tables.discard(EMBEDDING)
    for name in sorted(tables):
        shape = layout.shapes.get(name)
        if shape is None:
            _refuse(f"it lacks {name}")
        size = shape.rows, shape.columns
        if not shape.output_major or size != (
            spec.vocabulary,
            padded(spec.hidden, shape.format.columns),
        ):
            _refuse(f"{name} is no table of {spec.vocabulary} tokens by {spec.hidden} features")
    if HEAD_MATRIX not in layout.shapes and spec.head != spec.embedding:
        _refuse("it lacks the output head")

"""From a transformers model, loaded or on the meta device, to the shared block description.

A family says what its blocks are made of; what a block holds beyond that is refused, not left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from acttail.engine.families import FAMILIES, Family
from acttail.engine.families.family import EXPERT
from acttail.engine.spec import (
    MOST_ACTIVE,
    RECTIFIED,
    BlockSpec,
    DecoderSpec,
    ExpertsSpec,
    UnsupportedModelError,
    bias_of,
)
from acttail.model.projections import Projection, decoder_blocks, find_projections
from acttail.model.relu import AFTER_NORMS, rectified_norms
from acttail.model.weights import StoredWeights

# Numbers of native/engine.h.
_ACTIVATIONS = {
    "silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2, "relu": 3, AFTER_NORMS: 3,
}  # fmt: skip


def describe(model: Any) -> DecoderSpec:
    """Describe a transformers decoder.

    Raises:
        UnsupportedModelError: a family or a variant of one that the engine does not run; says which.
    """
    outer = model.config
    config = outer.get_text_config()
    name = config.model_type
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"the native engine does not run {name} models (it runs {', '.join(FAMILIES)})"
        )
    family = FAMILIES[name]
    _check_variant(family, config)
    path, stack = decoder_blocks(model)
    prefix = path.rpartition(".")[0]
    root: Any = model.get_submodule(prefix)
    projections: dict[int, list[Projection]] = {}
    for p in find_projections(model):
        projections.setdefault(p.block, []).append(p)
    tables, index_of = _ropes(family, root, config)
    blocks = []
    for i, block in enumerate(stack):
        own = _own_projections(family, projections[i], i)
        blocks.append(BlockSpec(
            {kind: p.name for kind, p in own.items()},
            _norms(family, f"{path}.{i}", block, projections[i], i),
            family.window(config, i),
            _rope_of(family, config, index_of, i),
            next((p.d_in for kind, p in own.items() if kind in ("down", "fc2")), None),
            _experts(family, config, f"{path}.{i}", projections[i], i),
        ))  # fmt: skip
    inner = max(n for b in blocks for n in (b.inner, b.experts and b.experts.inner) if n)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError("the native engine needs an output head")
    tokens: Any = model.get_input_embeddings()
    embedding = _name_of(model, tokens)
    # What transformers has untied, because the checkpoint has a head of its own, is not tied.
    table: Any = head.weight
    tied = bool(getattr(outer, "tie_word_embeddings", False)) and (
        table is tokens.weight or table.device.type == "meta"
    )

    def setting(key: str | float | None, default: float = 0.0) -> float:
        found = getattr(config, key, None) if isinstance(key, str) else key
        return float(found or default)

    if tokens.embedding_dim != config.hidden_size:
        raise UnsupportedModelError(
            f"the native engine does not run embeddings of {tokens.embedding_dim} features in a stream of "
            f"{config.hidden_size}"
        )

    return DecoderSpec(
        family=name, hidden=config.hidden_size, heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads, head_dim=head_dim,
        intermediate=inner, vocabulary=tokens.num_embeddings,
        context=_context(config), norm_eps=setting(family.norm_eps), norm_shift=family.norm_shift,
        activation=_activation(family, config),
        attention_scale=setting(family.attention_scale, setting(family.attention_scalar, head_dim) ** -0.5),
        attention_softcap=setting(family.attention_softcap), logit_softcap=setting(family.logit_softcap),
        embedding_scale=family.embedding_scale(config),
        embedding=embedding, head=embedding if tied else _name_of(model, head),
        final_norm=f"{prefix}.{family.final_norm}.weight", blocks=tuple(blocks), ropes=tables,
        layer_norm=family.layer_norm,
        positions=f"{prefix}.{family.positions.module}.weight" if family.positions else None,
        first_position=family.positions.first if family.positions else 0,
        head_bias=f"{_name_of(model, head).removesuffix('weight')}bias" if getattr(head, "bias", None) is not None else None,
        parallel=family.parallel, residual_scale=setting(family.residual_scale, 1.0),
        logit_scale=1 / setting(family.logit_divisor, 1.0), rectified=_rectified(family, config),
    )  # fmt: skip


def with_own_head(spec: DecoderSpec, model: Any, weights: StoredWeights) -> DecoderSpec:
    """Trust the file: what it keeps apart from the embedding is a head, though the config calls them tied.

    Args:
        spec: of the model.
        model: on the meta device.
        weights: of the file.
    """
    head = _name_of(model, model.get_output_embeddings())
    tied = spec.head == spec.embedding
    return replace(spec, head=head) if tied and weights.apart(head, spec.embedding) else spec


def _check_variant(family: Family, config: Any) -> None:
    for key, why in (
        ("use_bidirectional_attention", "bidirectional attention"),
        ("alibi", "ALiBi"),
    ):
        if getattr(config, key, None):
            raise UnsupportedModelError(f"the native engine does not run {why}")
    for key, value in family.only.items():
        found = getattr(config, key, value)
        if found != value:
            raise UnsupportedModelError(
                f"the native engine does not run {config.model_type} models whose {key} is {found}"
            )


def _context(config: Any) -> int:
    """Longest sequence for which the rope tables stay as they are."""
    longest = int(config.max_position_embeddings)
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") in ("longrope", "dynamic"):
        original: Any = parameters.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", longest
        )
        return min(longest, int(original))
    return longest


def _activation(family: Family, config: Any) -> int:
    name = next(filter(None, (getattr(config, key, None) for key in family.activation)), None)
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"the native engine does not know the activation {name}")
    return _ACTIVATIONS[name]


def _rectified(family: Family, config: Any) -> tuple[str, ...]:
    """Roles of the norms that ReLU follows."""
    role_of = {module: role for role, module in family.norms.items()}
    names = rectified_norms(config)
    strange = next((name for name in names if role_of.get(name) not in RECTIFIED), None)
    if strange is not None:
        raise UnsupportedModelError(f"the native engine does not run ReLU after {strange}")
    said = next(filter(None, (getattr(config, key, None) for key in family.activation)), None)
    if said == AFTER_NORMS and not names:
        raise UnsupportedModelError(f"the config calls its activation {said} and names no norms")
    return tuple(sorted(role_of[name] for name in names))


def _ropes(
    family: Family, root: Any, config: Any
) -> tuple[tuple[tuple[list[float], float], ...], dict[str | None, int]]:
    """Rope tables, and layer type (None: every layer) -> index, which is -1 for none."""
    if family.positions is not None:
        return (), {None: -1}
    with torch.device("cpu"):
        rotary = type(root.rotary_emb)(config=config)
    if hasattr(rotary, "inv_freq"):
        table = (rotary.inv_freq.float().tolist(), float(rotary.attention_scaling))
        return (table,), {None: 0}
    tables: list[tuple[list[float], float]] = []
    index: dict[str | None, int] = {}
    for layer_type in sorted(set(config.layer_types)):
        frequencies = getattr(rotary, f"{layer_type}_inv_freq", None)
        if frequencies is None:
            raise UnsupportedModelError(f"the {layer_type} blocks have no rotary embedding")
        index[layer_type] = len(tables)
        scale = float(getattr(rotary, f"{layer_type}_attention_scaling"))
        tables.append((frequencies.float().tolist(), scale))
    return tuple(tables), index


def _rope_of(family: Family, config: Any, index_of: Mapping[str | None, int], block: int) -> int:
    """Index of a block's rope table; -1 for none."""
    if family.turned is not None and not family.turned(config, block):
        return -1
    return index_of[None] if None in index_of else index_of[config.layer_types[block]]


def _own_projections(
    family: Family, projections: Sequence[Projection], index: int
) -> dict[str, Projection]:
    """Kind -> projection of a block, apart from its experts'."""
    own = [p for p in projections if p.expert is None]
    routed = {p.kind for p in projections if p.expert is not None}
    kinds = family.beside_experts if routed else family.projections
    wanted = EXPERT if routed and family.routing is not None else frozenset()
    if routed != wanted or sorted(p.kind for p in own) != sorted(kinds):
        raise UnsupportedModelError(
            "the native engine does not run a block of "
            f"{', '.join(sorted({p.kind for p in projections}))} (block {index})"
        )
    return {p.kind: p for p in own}


def _experts(
    family: Family, config: Any, path: str, projections: Sequence[Projection], index: int
) -> ExpertsSpec | None:
    """A block's experts; None without."""
    routed = [p for p in projections if p.expert is not None]
    routing = family.routing
    if not routed or routing is None:
        return None
    by_expert: dict[int, dict[str, Projection]] = {}
    for p in routed:
        by_expert.setdefault(p.expert or 0, {})[p.kind] = p
    active = int(getattr(config, routing.active))
    if not 1 <= active <= min(len(by_expert), MOST_ACTIVE):
        raise UnsupportedModelError(
            f"the native engine does not run {config.model_type} models whose {routing.active} is {active} "
            f"(block {index} has {len(by_expert)} experts, and {MOST_ACTIVE} are the most)"
        )
    normalised = routing.normalised
    return ExpertsSpec(
        f"{path}.{routing.router}.weight",
        tuple({kind: p.name for kind, p in by_expert[e].items()} for e in range(len(by_expert))),
        active,
        by_expert[0]["down"].d_in,
        bool(getattr(config, normalised) if isinstance(normalised, str) else normalised),
        f"{path}.{routing.shared_gate}.weight" if routing.shared else None,
    )


def _norms(
    family: Family, path: str, block: nn.Module, projections: Sequence[Projection], index: int
) -> dict[str, str]:
    """Role -> weight of a block's norms, once nothing else is in it."""
    names = {role: f"{path}.{name}.weight" for role, name in family.norms.items()}
    held = {f"{path}.{name}" for name, _ in block.named_parameters()}
    known = set(names.values())
    if family.layer_norm:
        known |= {bias_of(name) for name in names.values()}
    routing = family.routing
    if routing is not None and any(p.expert is not None for p in projections):
        gates = [routing.router, *([routing.shared_gate] if routing.shared else [])]
        known |= {f"{path}.{gate}.weight" for gate in gates}
    missing = sorted(known - held)
    for p in projections:
        known |= {p.parameter_name, f"{p.module}.bias"}
    strange = sorted(held - known)
    if missing or strange:
        what = (
            f"lacks {missing[0]}"
            if missing
            else f"has {strange[0]}, which the engine does not know"
        )
        raise UnsupportedModelError(
            f"the native engine does not run this model: block {index} {what}"
        )
    return names


def _name_of(model: nn.Module, wanted: Any) -> str:
    for name, module in model.named_modules():
        if module is wanted:
            return f"{name}.weight"
    raise UnsupportedModelError("the model's embedding is not one of its modules")

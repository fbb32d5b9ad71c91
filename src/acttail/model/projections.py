"""Find the projections of any transformers decoder: the linear maps inside its blocks.

Works on the module tree alone, so a model on the meta device (shapes without weights) will do. It
knows nothing of sparsity.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from acttail.errors import ModelError

# Last component of a module's name -> the kind it is called by in this field.
_KINDS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o",
    "query": "q", "key": "k", "value": "v", "wq": "q", "wk": "k", "wv": "v", "wo": "o",
    "qkv_proj": "qkv", "query_key_value": "qkv", "c_attn": "qkv", "Wqkv": "qkv", "in_proj": "in",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up",
    "w1": "gate", "w3": "up", "w2": "down",
    "fc1": "fc1", "fc2": "fc2", "c_fc": "fc1", "fc_in": "fc1", "fc_out": "fc2",
    "dense_h_to_4h": "fc1", "dense_4h_to_h": "fc2",
}  # fmt: skip
# Kinds that read the vector entering their half of the block: the attention's or the MLP's.
_ATTENTION_INPUT = {"q", "k", "v", "qkv"}
_MLP_INPUT = {"gate", "up", "gate_up", "fc1"}
# Kind of the output head, the one projection that stands after the blocks.
HEAD = "lm_head"
# A router chooses experts; it is tiny, and dropping its inputs changes which weights are read.
_ROUTER = re.compile(r"(router|(^|\.)(shared_expert_)?gate)$")


@dataclass(frozen=True)
class Projection:
    """One linear map of a decoder block, one expert's slice of a stacked parameter, or the output head.

    Attributes:
        name: unique; the module's path, with ``.<expert>`` appended for a stacked expert.
        block: index of the decoder block; of the output head, the number of blocks.
        kind: ``q k v o gate up down``, fused ``qkv gate_up``, ``fc1 fc2``, ``lm_head``, or the module's own
            name.
        d_in: input features.
        d_out: output features.
        cost: weights read per decoded token: d_in * d_out, times top_k / experts for a routed expert.
        module: path of the module that holds the weight.
        parameter: the parameter's name in that module.
        expert: index along the parameter's first dimension, None for an ordinary matrix.
        transposed: True when the weight is stored [d_in, d_out] (GPT-2's Conv1D).
        shared_input: names of the other projections that read the same input vector.
        tied: full name of the parameter that the weight is, where it is another module's: a tied head's is
            the embedding's.
    """

    name: str
    block: int
    kind: str
    d_in: int
    d_out: int
    cost: float
    module: str
    parameter: str
    expert: int | None
    transposed: bool
    shared_input: tuple[str, ...] = ()
    tied: str | None = None

    @property
    def parameter_name(self) -> str:
        """Full name of the parameter in the model's state dict."""
        return self.tied or f"{self.module}.{self.parameter}"


def weight_of(model: nn.Module, projection: Projection) -> torch.Tensor:
    """The projection's weight as a view of the model's parameter, [d_out, d_in]."""
    weight = model.get_parameter(projection.parameter_name).detach()
    if projection.expert is not None:
        weight = weight[projection.expert]
    return weight.T if projection.transposed else weight


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of decoder blocks and its path.

    Raises:
        ModelError: the model is not a decoder of transformers, or has no single stack of blocks.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} is not a transformers model (it has no config)")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder; acttail takes decoders only"
        )
    get_decoder = getattr(model, "get_decoder", None)
    root = get_decoder() if callable(get_decoder) else None
    root = model if root is None else root
    get_text_config = getattr(config, "get_text_config", None)
    text_config = get_text_config() if callable(get_text_config) else config
    depth = getattr(text_config, "num_hidden_layers", None)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and len(module) > 0
        and any(module is inner for inner in root.modules())
    ]
    # An MoE block with as many experts as the model has blocks also matches; blocks are outermost.
    outermost = [s for s in stacks if not any(s[0].startswith(f"{o[0]}.") for o in stacks)]
    if not outermost:
        raise ModelError(
            f"{type(model).__name__} has no stack of {depth} decoder blocks; "
            "acttail needs a transformers decoder such as LlamaForCausalLM"
        )
    return max(outermost, key=lambda s: sum(p.numel() for p in s[1].parameters()))


def _experts_per_token(model: nn.Module, path: str, experts: int) -> int:
    """How many experts a token visits, from the MoE block's own router or else from the config."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        holder = model.get_submodule(".".join(parts[:depth]))
        for candidate in (holder, *(child for _, child in holder.named_children())):
            top_k = getattr(candidate, "top_k", None) or getattr(
                candidate, "num_experts_per_tok", None
            )
            if isinstance(top_k, int):
                return min(top_k, experts)
        if depth < len(parts) - 2:
            break
    config: Any = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "top_k_experts",
    ):
        top_k = getattr(text_config, key, None)
        if isinstance(top_k, int):
            return min(top_k, experts)
    raise ModelError(f"cannot tell how many of the {experts} experts at {path} a token visits")


def is_stacked_experts(module: nn.Module) -> bool:
    """Whether a module holds all its experts in 3-D parameters, as current transformers do."""
    return hasattr(module, "num_experts") and any(
        p.dim() == 3 for _, p in module.named_parameters(recurse=False)
    )


def _linear_shape(module: nn.Module) -> tuple[int, int, bool] | None:
    """(d_in, d_out, stored transposed) of a linear-like module, None for any other."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, False
    weight = getattr(module, "weight", None)
    # transformers' Conv1D, told by its fields so that this file needs no import of transformers.
    if isinstance(weight, torch.Tensor) and weight.dim() == 2 and hasattr(module, "nf"):
        return weight.shape[0], weight.shape[1], True
    return None


def _kind(path: str) -> str:
    leaf = path.rsplit(".", 1)[-1]
    if leaf == "c_proj":  # GPT-2 names both outputs alike
        return "o" if "attn" in path else "fc2"
    if leaf == "dense" and "att" in path:
        return "o"
    return _KINDS.get(leaf, leaf)


def _block_projections(
    model: nn.Module, block_path: str, block: int, module: nn.Module
) -> Iterator[Projection]:
    for relative, child in module.named_modules():
        path = f"{block_path}.{relative}" if relative else block_path
        if is_stacked_experts(child):
            yield from _stacked(model, path, block, child)
            continue
        shape = _linear_shape(child)
        if shape is None or _ROUTER.search(relative):
            continue
        d_in, d_out, transposed = shape
        cost = float(d_in * d_out)
        listed = re.match(r"(.*experts)\.\d+\.", path)
        if listed:
            experts = len(list(model.get_submodule(listed[1]).children()))
            cost *= _experts_per_token(model, listed[1], experts) / experts
        yield Projection(
            path, block, _kind(path), d_in, d_out, cost, path, "weight", None, transposed
        )


def _stacked(model: nn.Module, path: str, block: int, module: nn.Module) -> Iterator[Projection]:
    transposed = bool(getattr(module, "is_transposed", False))
    for parameter, weight in module.named_parameters(recurse=False):
        if weight.dim() != 3:
            continue
        experts, rows, columns = weight.shape
        d_out, d_in = (columns, rows) if transposed else (rows, columns)
        share = _experts_per_token(model, path, experts) / experts
        for expert in range(experts):
            yield Projection(
                f"{path}.{parameter}.{expert}", block, _kind(parameter), d_in, d_out,
                d_in * d_out * share, path, parameter, expert, transposed,
            )  # fmt: skip


def _input_group(projection: Projection) -> str:
    """Label of the vector a projection reads; equal labels mean the same vector."""
    parent = projection.module.rsplit(".", 1)[0]
    if projection.kind in _ATTENTION_INPUT:
        return f"{parent}:input"
    if projection.kind in _MLP_INPUT:
        # Routed experts and the shared expert of one MoE block all read the block's input.
        mlp = re.sub(r"\.(experts(\.\d+)?|shared_experts?)$", "", parent)
        if projection.expert is not None:
            mlp = re.sub(r"\.experts$", "", projection.module)
        return f"{mlp}:input"
    return projection.name


def find_projections(model: nn.Module) -> list[Projection]:
    """List the projections of a transformers decoder, in the order of its modules.

    Every nn.Linear (subclasses too), Conv1D and stacked expert inside a decoder block counts; the
    embeddings and routers do not, and the output head is found by :func:`find_head`.

    Args:
        model: a causal LM of transformers, on any device, the meta device included.

    Returns:
        One entry per projection, block by block.

    Raises:
        ModelError: the model is not a decoder, or nothing was found in one of its blocks.
    """
    stack_path, stack = decoder_blocks(model)
    found: list[Projection] = []
    for index, block in enumerate(stack):
        in_block = list(_block_projections(model, f"{stack_path}.{index}", index, block))
        if not in_block:
            raise ModelError(
                f"no linear projection found in block {index} of {type(model).__name__}"
            )
        found += in_block
    groups: dict[str, list[str]] = defaultdict(list)
    for projection in found:
        groups[_input_group(projection)].append(projection.name)
    return [_with_shared_input(p, groups[_input_group(p)]) for p in found]


def find_head(model: nn.Module) -> Projection | None:
    """The output head as a projection, which comes after those of the blocks.

    Args:
        model: a causal LM of transformers, on any device, the meta device included.

    Returns:
        None where the model has no head, or one that is no nn.Linear.
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if not isinstance(head, nn.Linear):
        return None
    # Two names of one module, if there were, would make one projection: the first is taken.
    name = next((n for n, module in model.named_modules() if module is head), None)
    if name is None:
        return None
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    tied = None
    if getattr(embedding, "weight", None) is head.weight:
        tied = next(f"{n}.weight" for n, module in model.named_modules() if module is embedding)
    d_in, d_out = head.in_features, head.out_features
    return Projection(
        name, len(decoder_blocks(model)[1]), HEAD, d_in, d_out, float(d_in * d_out), name, "weight", None,
        transposed=False, tied=tied,
    )  # fmt: skip


def find_all(model: nn.Module) -> list[Projection]:
    """The projections of the blocks and, after them, the output head if it is one; see both functions."""
    head = find_head(model)
    return [*find_projections(model), *([] if head is None else [head])]


def _with_shared_input(projection: Projection, group: list[str]) -> Projection:
    others = tuple(name for name in group if name != projection.name)
    return Projection(**{**projection.__dict__, "shared_input": others})


def gated_mlps(projections: list[Projection]) -> list[tuple[Projection, Projection, Projection]]:
    """(gate, up, down) of every MLP that has these three as matrices of their own; no routed experts."""
    by_parent: dict[str, dict[str, Projection]] = defaultdict(dict)
    for p in projections:
        if p.expert is None and p.cost == p.d_in * p.d_out:
            by_parent[p.module.rpartition(".")[0]][p.kind] = p
    return [
        (mlp["gate"], mlp["up"], mlp["down"])
        for mlp in by_parent.values()
        if {"gate", "up", "down"} <= set(mlp)
    ]

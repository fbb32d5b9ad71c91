"""The shared block description: what a decoder of any supported family does with its weights.

Data alone: :mod:`acttail.engine.describe` makes it of a model, prompts and native kernels run by it.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le, Len

from acttail.base.schema import STRICT, Count, Name, NotNegative, Size
from acttail.errors import ActTailError, PlanError
from acttail.plan import SparsityPlan
from acttail.sparse.rules import RULES, kind_of

# Experts that a token may visit in a block; native/check.cpp says the same.
MOST_ACTIVE = 256


# Roles of the norms that ReLU may follow: those in front of the attention's and of the MLP's projections.
RECTIFIED = ("input_norm", "mlp_norm")


class UnsupportedModelError(ActTailError):
    """The native engine does not know this family or variant; transformers runs it instead."""


class UnsupportedRuleError(UnsupportedModelError, PlanError):
    """The native engine does not run the plan's rule; transformers runs it instead."""


def check_rule(plan: SparsityPlan | None) -> None:
    """Make sure that the native engine runs a plan, before anything is converted for it.

    Args:
        plan: about to be run; None for dense.

    Raises:
        UnsupportedRuleError: its rule has no native code; names those that have.
    """
    if plan is not None and kind_of(plan).native is None:
        known = ", ".join(name for name, kind in RULES.items() if kind.native is not None)
        raise UnsupportedRuleError(
            f"the native engine does not run plans of the rule {plan.rule} (it runs {known})"
        )


def mlp_norm_of(norms: Container[str]) -> str:
    """The role of the norm before a block's MLP: its own, or the one before its attention."""
    return "mlp_norm" if "mlp_norm" in norms else "input_norm"


def bias_of(norm: str) -> str:
    """Parameter name of a norm's bias, from that of its weight."""
    return f"{norm.removesuffix('.weight')}.bias"


@dataclass(frozen=True)
class ExpertsSpec:
    """The MLPs of a block of which a router chooses some for each token.

    Attributes:
        router: parameter, [experts, hidden].
        projections: of each expert, kind (gate_up, down) -> name.
        active: experts that a token visits.
        inner: features inside of each.
        normalised: whether the active experts' weights are divided by their sum.
        shared_gate: parameter, [1, hidden], whose sigmoid is the weight of the block's own MLP beside the experts;
            None where it has none.
    """

    __pydantic_config__ = STRICT

    router: Name
    projections: Annotated[tuple[dict[Name, Name], ...], Len(1, 1 << 16)]
    active: Annotated[int, Ge(1), Le(MOST_ACTIVE)]
    inner: Size
    normalised: bool
    shared_gate: Name | None = None


@dataclass(frozen=True)
class BlockSpec:
    """One block.

    Attributes:
        projections: kind -> name, for q, k, v, o, gate, up, down, the fused qkv and gate_up, or the
            fc1 and fc2 of an MLP without a gate. Those of an MLP are the ones that every token visits; a block
            with experts may have none.
        norms: role (input_norm, attention_norm, mlp_norm, output_norm, q_norm, k_norm) -> parameter; without
            an mlp_norm the input_norm is that, too.
        window: positions a token sees, itself included; 0 for all.
        rope: index of the rope table; -1 for none.
        inner: features inside of its own MLP; None for as many as the decoder says.
        experts: beside its own MLP, or instead of one; None without.
    """

    __pydantic_config__ = STRICT

    projections: dict[Name, Name]
    norms: dict[Name, Name]
    window: Count
    rope: Annotated[int, Ge(-1)]
    inner: Size | None = None
    experts: ExpertsSpec | None = None


@dataclass(frozen=True)
class DecoderSpec:
    """A whole decoder. Sizes are numbers of features, heads or tokens.

    Attributes:
        family: transformers' model type.
        intermediate: features inside of an MLP; where they differ, of the widest.
        ropes: [(inverse frequencies, scale)], one per table.
        context: longest sequence.
        norm_shift: added to every norm's weight (1 for Gemma).
        layer_norm: LayerNorm, with weight and bias, instead of RMSNorm.
        embedding: parameter name of the embedding.
        head: parameter name of the output head; the embedding's if tied.
        final_norm: parameter name.
        positions: parameter name of a learned embedding of positions; None without.
        first_position: its row of position 0.
        head_bias: parameter name; None without.
        parallel: the MLP reads the stream as it was before the attention.
        residual_scale: of what attention and MLP add to the stream.
        logit_scale: of the head's products, before its bias.
        rectified: roles of the blocks' norms that ReLU follows.
    """

    __pydantic_config__ = STRICT

    family: Name
    hidden: Size
    heads: Annotated[int, Ge(1), Le(1 << 16)]
    kv_heads: Annotated[int, Ge(1), Le(1 << 16)]
    head_dim: Annotated[int, Ge(2), Le(1 << 14)]
    intermediate: Size
    vocabulary: Size
    context: Size
    norm_eps: NotNegative
    norm_shift: float
    activation: Annotated[int, Ge(0), Le(3)]
    attention_scale: float
    attention_softcap: NotNegative
    logit_softcap: NotNegative
    embedding_scale: float
    embedding: Name
    head: Name
    final_norm: Name
    blocks: Annotated[tuple[BlockSpec, ...], Len(1, 1 << 16)]
    ropes: tuple[tuple[list[float], float], ...]
    layer_norm: bool = False
    positions: Name | None = None
    first_position: Count = 0
    head_bias: Name | None = None
    parallel: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    rectified: tuple[Name, ...] = ()

    def rectifies(self, norm: str) -> bool:
        """Whether ReLU follows a norm, named by its role at the end."""
        return norm.rpartition(".")[2] in self.rectified

    def inner(self, block: int) -> int:
        """Features inside of a block's own MLP."""
        return self.blocks[block].inner or self.intermediate

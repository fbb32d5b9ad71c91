"""What one block family is: the fields that differ between families, each with its commonest value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Norms of a block by the role they play (see struct acttail_block), for the two ways of naming them.
TWO_NORMS = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
FOUR_NORMS = {
    "input_norm": "input_layernorm", "attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "output_norm": "post_feedforward_layernorm",
}  # fmt: skip
HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

MLP = frozenset({"gate", "up", "gate_up", "fc1", "down", "fc2"})
# Of each expert, as transformers stacks them.
EXPERT = frozenset({"gate_up", "down"})
GATED = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
FUSED = frozenset({"qkv", "o", "gate_up", "down"})
GATELESS = frozenset({"q", "k", "v", "o", "fc1", "fc2"})


@dataclass(frozen=True)
class Positions:
    """A learned embedding of positions, added to that of tokens; such models have no rotary embedding.

    Attributes:
        module: beside the blocks.
        first: its row of position 0.
    """

    module: str
    first: int = 0


@dataclass(frozen=True)
class Routing:
    """How the blocks with experts choose among them; blocks without are the family's others.

    Attributes:
        normalised: config key that says whether the active experts' weights are divided by their sum, or that it is so.
        shared: whether such a block has an MLP of its own beside the experts, weighed by the sigmoid of a gate.
        router: module of the block.
        shared_gate: module of the block, where there is a shared MLP.
        active: config key of how many experts a token visits.
    """

    normalised: str | bool
    shared: bool = False
    router: str = "mlp.gate"
    shared_gate: str = "mlp.shared_expert_gate"
    active: str = "num_experts_per_tok"


def no_window(config: Any, index: int) -> int:
    """Every block sees everything."""
    return 0


def every_window(config: Any, index: int) -> int:
    """Every block sees the config's sliding window, if there is one."""
    return int(config.sliding_window or 0)


def typed_window(config: Any, index: int) -> int:
    """The blocks that the config calls sliding see its window, the others everything."""
    sliding = config.layer_types[index] == "sliding_attention"
    return int(config.sliding_window or 0) if sliding else 0


@dataclass(frozen=True)
class Family:
    """A block family, in terms of transformers' modules and configs.

    Attributes:
        norms: role -> module of the block.
        norm_eps: config key of the norms' epsilon, or the number where no key names it.
        norm_shift: added to every norm's weight.
        layer_norm: LayerNorm with weight and bias instead of RMSNorm.
        projections: kinds of the block's projections (see :class:`Projection`).
        activation: config keys of the MLP's activation, the first that is set.
        window: (config, block) -> positions a token sees, itself included; 0 for all.
        embedding_scale: config -> factor of the embedding.
        attention_scalar: config key of what the scores are divided by the root of; None for the size
            of a head.
        attention_softcap: config key of the bound on the scores; None for none.
        logit_softcap: config key of the bound on the logits; None for none.
        final_norm: module beside the blocks.
        positions: learned ones; None for a rotary embedding.
        turned: (config, block) -> whether it has the rotary embedding; None where every block has.
        parallel: the MLP reads the stream as the attention does, before it.
        attention_scale: config key of the scores' factor itself; None for attention_scalar's.
        residual_scale: config key of the factor of what the two halves of a block add; None for 1.
        logit_divisor: config key of what the logits are divided by; None for 1.
        routing: of blocks with experts; None where no block has any.
        only: config keys and the value that each must have, if it is there: other variants are refused.
    """

    norms: Mapping[str, str]
    norm_eps: str | float = "rms_norm_eps"
    norm_shift: float = 0.0
    layer_norm: bool = False
    projections: frozenset[str] = GATED
    activation: tuple[str, ...] = ("hidden_act",)
    window: Callable[[Any, int], int] = no_window
    embedding_scale: Callable[[Any], float] = lambda config: 1.0
    attention_scalar: str | None = None
    attention_softcap: str | None = None
    logit_softcap: str | None = None
    final_norm: str = "norm"
    positions: Positions | None = None
    turned: Callable[[Any, int], bool] | None = None
    parallel: bool = False
    attention_scale: str | None = None
    residual_scale: str | None = None
    logit_divisor: str | None = None
    routing: Routing | None = None
    only: Mapping[str, Any] = field(default_factory=dict)

    @property
    def beside_experts(self) -> frozenset[str]:
        """Kinds of the projections of a block with experts, apart from theirs."""
        shared = self.routing is not None and self.routing.shared
        return self.projections if shared else self.projections - MLP

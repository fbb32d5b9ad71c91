"""GPT-2 and OPT: learned positions, LayerNorms, an MLP without a gate, biases everywhere."""

from acttail.engine.families.family import GATELESS, Family, Positions

GPT2 = Family(
    norms={"input_norm": "ln_1", "mlp_norm": "ln_2"}, norm_eps="layer_norm_epsilon", layer_norm=True,
    projections=frozenset({"qkv", "o", "fc1", "fc2"}), activation=("activation_function",), final_norm="ln_f",
    positions=Positions("wpe"),
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
)  # fmt: skip
# torch's own epsilon: the config has none. Its table of positions begins with two rows for padding.
OPT = Family(
    norms={"input_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}, norm_eps=1e-5, layer_norm=True,
    projections=GATELESS, activation=("activation_function",), final_norm="final_layer_norm",
    positions=Positions("embed_positions", 2),
    only={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
)  # fmt: skip

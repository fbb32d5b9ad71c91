"""Tiny GGUF files, as llama.cpp's converter writes them."""

import numpy as np
import torch
from families import config
from transformers import AutoModelForCausalLM


def blocky(seed=0):
    """A llama of 260 tokens whose matrices are whole blocks of 32 weights."""
    base = config("llama")
    settings = {**base.to_dict(), "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96}
    torch.manual_seed(seed)
    cfg = base.__class__(**settings | {"head_dim": 16})
    return AutoModelForCausalLM.from_config(cfg, dtype=torch.float32).eval()


def write_gguf(path, model, kind="F32", tokenizer=None):
    """A GGUF of a tiny model, for a llama with the row order llama.cpp uses for q and k.

    Args:
        path: of the file.
        model: of a family that transformers reads from GGUF.
        kind: gguf's name of the format of its matrices.
        tokenizer: of bytes, kept inside; with a merge more, for without any transformers asks for scores.
    """
    import gguf

    cfg = model.config
    architecture = {"gemma3_text": "gemma3"}.get(cfg.model_type, cfg.model_type)
    architecture = architecture.replace("_moe", "moe")
    head_dim = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    if hasattr(cfg, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(cfg.norm_epsilon)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    if architecture == "gemma3":
        writer.add_sliding_window(cfg.sliding_window)
    if architecture.endswith("moe"):
        writer.add_expert_count(cfg.num_experts)
        writer.add_expert_used_count(cfg.num_experts_per_tok)
        writer.add_expert_feed_forward_length(cfg.moe_intermediate_size)
        if hasattr(cfg, "shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(cfg.shared_expert_intermediate_size)
    writer.add_vocab_size(cfg.vocab_size)
    if tokenizer is not None:
        by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*(token for token, _ in by_id), "ab"])
        writer.add_token_types([*(3 if i < 3 else 1 for _, i in by_id), 1])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, cfg.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if cfg.tie_word_embeddings and name == "lm_head.weight":
            continue
        value = tensor.numpy()
        if architecture in ("gemma2", "gemma3") and "norm" in name:
            value = value + 1  # as Gemma's converter folds it in
        heads = (
            {}
            if architecture != "llama"
            else {"q_proj": cfg.num_attention_heads, "k_proj": cfg.num_key_value_heads}
        )
        for leaf, n in heads.items():
            if leaf in name:
                shape = value.shape
                value = (
                    value.reshape(n, 2, shape[0] // n // 2, *shape[1:])
                    .swapaxes(1, 2)
                    .reshape(shape)
                )
        leaf = ".bias" if name.endswith(".bias") else ".weight"
        if ".experts." in name:
            found = _experts(name, value)
        elif "shared_expert_gate" in name:
            found = {names.get_name(name.removesuffix(leaf)) + leaf: value[0]}
        else:
            found = {names.get_name(name.removesuffix(leaf)) + leaf: value}
        for stored, part in found.items():
            part = np.ascontiguousarray(part)
            if kind == "F32" or part.ndim == 1 or "gate_inp" in stored:
                writer.add_tensor(stored, part)
                continue
            chosen = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(stored, gguf.quantize(part, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _experts(name, value):
    """Name in a file -> array of stacked experts, [experts, d_out, d_in]; gate and up are two there."""
    block = f"blk.{name.split('.')[2]}"
    if name.endswith("down_proj"):
        return {f"{block}.ffn_down_exps.weight": value}
    half = value.shape[1] // 2
    return {
        f"{block}.ffn_gate_exps.weight": value[:, :half],
        f"{block}.ffn_up_exps.weight": value[:, half:],
    }


def rewrite_gguf(path, fields=None, lose=(), replace=None):
    """Change a GGUF file: what a broken converter or another model's would hold.

    Args:
        path: of the file, which is replaced.
        fields: key -> value, added or changed; None takes it away.
        lose: names of tensors that are left out.
        replace: name -> float32 array instead of a tensor, or a new one.
    """
    import gguf

    reader = gguf.GGUFReader(str(path))
    fields, replace = dict(fields or {}), dict(replace or {})
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(str(path) + ".new", architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in fields:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, inner)
    for key, value in fields.items():
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(
                key, value, gguf.GGUFValueType.UINT32 if kind.name == "INT32" else kind
            )
    for tensor in reader.tensors:
        if tensor.name in lose or tensor.name in replace:
            continue
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, value in replace.items():
        writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    del reader
    path.with_name(path.name + ".new").rename(path)


def split_gguf(path, stem, count):
    """Write the parts of a file as llama.cpp's gguf-split does; returns their places.

    Args:
        path: of the file.
        stem: of the parts' names, with their folder.
        count: of parts; the first holds the header and its share of the tensors.
    """
    import gguf

    reader = gguf.GGUFReader(str(path))
    parts = [stem.with_name(f"{stem.name}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    architecture = reader.fields["general.architecture"].contents()
    for i, part in enumerate(parts):
        writer = gguf.GGUFWriter(str(part), architecture)
        for key, field in reader.fields.items():
            if i == 0 and not key.startswith("GGUF.") and key != "general.architecture":
                kind = field.types[0]
                inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), kind, inner)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[i::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts

"""A GGUF file of random Q4_K and Q6_K blocks, by default in the shapes of Qwen2-1.5B: as large, as mixed, as slow to read.

Its tokenizer is SmolLM2's, cut or extended by merges of random pairs of its tokens to the size asked for; the weights are noise
of a plausible size, so what it writes is noise too. For measurements of loading and of speed, never of quality.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from acttail.base.files import replacing


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; `mixed` keeps v and down of some blocks in Q6_K, as llama.cpp's Q4_K_M does."""

    blocks: int = 28
    hidden: int = 1536
    intermediate: int = 8960
    heads: int = 12
    kv_heads: int = 2
    vocabulary: int = 151936
    mixed: bool = True


QWEN2 = Shape()


def blocks(rng: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray:
    """[rows, bytes of a row] uint8 of random blocks whose weights have a deviation of about 0.02."""
    size = {"Q4_K": 144, "Q6_K": 210}[kind]
    raw = rng.integers(0, 256, (rows * columns // 256, size), dtype=np.uint8)
    if kind == "Q4_K":
        scale = rng.uniform(0.8e-4, 1.6e-4, len(raw)).astype(np.float16)
        raw[:, :2] = scale[:, None].view(np.uint8)
        # Levels have a mean of 7.5, which the minimum takes away.
        raw[:, 2:4] = (scale * np.float16(7.5))[:, None].view(np.uint8)
    else:
        raw[:, 192:208] = raw[:, 192:208] % 48 + 16
        raw[:, 208:] = rng.uniform(2e-5, 4e-5, len(raw)).astype(np.float16)[:, None].view(np.uint8)
    return raw.reshape(rows, -1)


def vocabulary(
    rng: np.random.Generator, donor: Path, size: int
) -> tuple[list[bytes], list[int], list[bytes], bytes | None]:
    """Tokens, their types, merges and the chat template of a donor's file, cut or extended to `size` tokens."""
    from gguf import GGUFReader

    reader = GGUFReader(str(donor))

    def strings(key: str) -> list[bytes]:
        field = reader.fields[key]
        return [field.parts[i].tobytes() for i in field.data]

    tokens, merges = strings("tokenizer.ggml.tokens"), strings("tokenizer.ggml.merges")
    types = [int(n) for n in reader.fields["tokenizer.ggml.token_type"].contents()]
    tokens, types = tokens[:size], types[:size]
    known = set(tokens)
    merges = [m for m in merges if m.replace(b" ", b"") in known]
    plain = [t for t, kind in zip(tokens, types, strict=True) if kind == 1 and len(t) < 12]
    while len(tokens) < size:
        first, second = (plain[i] for i in rng.integers(0, len(plain), 2))
        if first + second not in known:
            known.add(first + second)
            tokens.append(first + second)
            types.append(1)
            merges.append(first + b" " + second)
    template = reader.fields.get("tokenizer.chat_template")
    return tokens, types, merges, template.parts[template.data[0]].tobytes() if template else None


def write(
    path: Path, donor: Path, *, seed: int = 0, tied: bool = True, shape: Shape = QWEN2
) -> None:
    """Write the file, whole or not at all.

    Args:
        path: of the file.
        donor: a GGUF file with a byte-level BPE tokenizer.
        seed: of the weights and the merges.
        tied: whether the output head is the embedding, as Qwen2-1.5B has it.
        shape: of the model.
    """
    import gguf

    rng = np.random.default_rng(seed)
    tokens, types, merges, template = vocabulary(rng, donor, shape.vocabulary)
    writer = gguf.GGUFWriter(None, "qwen2")
    writer.add_name("random-qwen2-1.5b")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_context_length(32768)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.blocks)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(template.decode())

    def matrix(name: str, kind: str, rows: int, columns: int) -> None:
        chosen = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", blocks(rng, kind, rows, columns), raw_dtype=chosen)

    def vector(name: str, values: np.ndarray) -> None:
        writer.add_tensor(name, values.astype(np.float32))

    matrix("token_embd", "Q6_K", shape.vocabulary, shape.hidden)
    if not tied:
        matrix("output", "Q6_K", shape.vocabulary, shape.hidden)
    vector("output_norm.weight", np.ones(shape.hidden))
    narrow = shape.hidden // shape.heads * shape.kv_heads
    for i in range(shape.blocks):
        # llama.cpp's rule for Q4_K_M: more bits for v and down in the first and last eighths, and every third between.
        more = (
            i < shape.blocks // 8 or i >= 7 * shape.blocks // 8 or (i - shape.blocks // 8) % 3 == 2
        )
        wide = "Q6_K" if more and shape.mixed else "Q4_K"
        at = f"blk.{i}"
        for leaf, kind, rows, columns in (
            ("attn_q", "Q4_K", shape.hidden, shape.hidden), ("attn_k", "Q4_K", narrow, shape.hidden), ("attn_v", wide, narrow, shape.hidden),
            ("attn_output", "Q4_K", shape.hidden, shape.hidden), ("ffn_gate", "Q4_K", shape.intermediate, shape.hidden),
            ("ffn_up", "Q4_K", shape.intermediate, shape.hidden), ("ffn_down", wide, shape.hidden, shape.intermediate),
        ):  # fmt: skip
            matrix(f"{at}.{leaf}", kind, rows, columns)
            if leaf in ("attn_q", "attn_k", "attn_v"):
                vector(f"{at}.{leaf}.bias", rng.normal(0, 0.02, rows))
        vector(f"{at}.attn_norm.weight", np.ones(shape.hidden))
        vector(f"{at}.ffn_norm.weight", np.ones(shape.hidden))
    with replacing(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def main() -> None:
    """Write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--untied", action="store_true")
    args = parser.parse_args()
    from acttail.model.names import resolve

    write(args.path, resolve("smollm2-135m", None).gguf, tied=not args.untied)


if __name__ == "__main__":
    main()

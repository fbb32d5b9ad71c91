"""Sparse decoding on a GPU, at the shapes of 7B and 8B models with random weights.

Tokens per second of whole models through transformers with a static cache, sparse against dense, eager, compiled and
as a CUDA graph, by turns. Appends to gpu_decode.csv. Needs one CUDA or ROCm device and Triton.

    python benchmarks/gpu_decode.py [--shapes llama-3-8b --blocks 8]
"""

import torch
from common import Rows
from gpu import SHAPES, arguments, device, device_name, on
from transformers import AutoModelForCausalLM, LlamaConfig

from acttail.allocate import make_plan
from acttail.evaluate.gpu import MODES, gpu_bench, read_bandwidth


def config(name: str, blocks: int | None) -> LlamaConfig:
    hidden, intermediate, heads, kv_heads, depth, vocabulary = SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=kv_heads, num_hidden_layers=blocks or depth, vocab_size=vocabulary,
        max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip


def random_model(cfg: LlamaConfig, dtype: torch.dtype, device: torch.device):
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return AutoModelForCausalLM.from_config(cfg).eval()
    finally:
        torch.set_default_dtype(before)


def run(args, rows, device, dtype):
    reads = read_bandwidth(device)
    for name in args.shapes:
        cfg = config(name, args.blocks)
        lm = random_model(cfg, dtype, device)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, cfg.vocab_size, (args.prompt_tokens,), generator=generator)
        for sparsity in args.sparsities:
            plan = make_plan(lm, sparsity, allocator="uniform")
            speed, traffic = gpu_bench(
                lm, plan, prompt, new_tokens=args.new_tokens, rounds=args.rounds, modes=args.modes
            )  # fmt: skip
            for who in speed.decode:
                row = {
                    "shapes": name, "blocks": cfg.num_hidden_layers, "device": device_name(device),
                    "dtype": args.dtype, "sparsity": sparsity, "what": who,
                    "tokens_per_second": round(speed.median(who), 2),
                    "bytes_per_token": traffic[who],
                    "share_of_bandwidth": round(traffic[who] * speed.median(who) / reads, 3),
                    "bandwidth": round(reads / 1e9, 1), "rounds": args.rounds,
                }  # fmt: skip
                for mode in args.modes:
                    ratio = speed.ratio(who, f"dense {mode}")
                    row[f"over_dense_{mode}"] = round(ratio.median, 3)
                    row[f"over_dense_{mode}_low"] = round(ratio.low, 3)
                    row[f"over_dense_{mode}_high"] = round(ratio.high, 3)
                rows.append(row, on(name))
        del lm
        torch.cuda.empty_cache()


def main():
    parser = arguments(__doc__)
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    run(args, Rows("gpu_decode", args.out), device(), getattr(torch, args.dtype))


if __name__ == "__main__":
    main()

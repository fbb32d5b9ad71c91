"""What the benchmarks on a GPU share: shapes of models, their options, the device."""

import torch
from common import On, options

from acttail.sparse.backends import triton

# hidden, intermediate, heads, KV heads, blocks, vocabulary
SHAPES = {
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": (4096, 14336, 32, 8, 32, 128256),
    "mistral-7b": (4096, 14336, 32, 8, 32, 32000),
}
SPARSITIES = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8)


def on(shapes):
    """What a row is measured on; the device is a column of its own."""
    return On(f"{shapes} shapes, random weights", "random tokens")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def arguments(doc):
    """The options they have in common."""
    parser = options(doc, rounds=7)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    return parser


def device():
    """The GPU.

    Raises:
        SystemExit: there is none, or no Triton.
    """
    if not torch.cuda.is_available() or not triton.status().available:
        raise SystemExit(f"this needs a GPU: {triton.status().reason or 'torch sees none'}")
    return torch.device("cuda")

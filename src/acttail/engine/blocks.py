"""Rows come in blocks of 64 entries: how many there are, and how two nibbles share a byte of one."""

import torch

# native/formats.hpp, kBlock: columns come in blocks of this many, and rows are padded to whole blocks.
BLOCK = 64


def padded(n: int, block: int = BLOCK) -> int:
    """The number rounded up to whole blocks."""
    return -(-n // block) * block


def pack_nibbles(levels: torch.Tensor) -> torch.Tensor:
    """[rows, columns] levels 0..15 -> [rows, columns / 2] uint8.

    In a block of 64 entries, byte i holds entry i in its low bits and entry 32 + i in its high ones.
    """
    rows, columns = levels.shape
    halves = levels.reshape(rows, columns // BLOCK, 2, BLOCK // 2).to(torch.uint8)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, columns // 2)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_nibbles`: [rows, columns] uint8."""
    rows, half = packed.shape
    halves = packed.reshape(rows, 2 * half // BLOCK, BLOCK // 2)
    return torch.stack([halves & 15, halves >> 4], dim=2).reshape(rows, 2 * half)

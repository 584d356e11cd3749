"""The mask of a packed row, made on the device from `ends`: place i sees the places j <= i < ends[j].

Two forms of the same mask: a dense tensor for attention that takes one, and a block mask for torch's flex attention,
which skips the blocks that hold nothing and never stores a T x T array.
Letters: R rows, T places a row, B blocks a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # places; flex attention skips blocks of such a size


def dense_mask(ends: torch.Tensor) -> torch.Tensor:
    """Return the mask as a tensor (R, 1, T, T) bool, True = sees; ends (R, T)."""
    place = torch.arange(ends.shape[1], device=ends.device)
    query, key = place[:, None], place[None, :]
    return ((key <= query) & (query < ends[:, None, :]))[:, None]


def block_mask(ends: torch.Tensor) -> BlockMask:
    """Return the mask for flex attention; ends (R, T).

    Which blocks hold something follows from the smallest and the largest end in a block of keys: B numbers each, so
    nothing of size T x T is made, and the device is not waited for.
    """
    length = ends.shape[1]
    count = -(-length // BLOCK)  # B
    pad = (0, count * BLOCK - length)
    latest = F.pad(ends, pad, value=0).view(-1, count, BLOCK).amax(-1)[:, None, :]  # (R, 1, B) of each block of keys
    earliest = F.pad(ends, pad, value=length).view(-1, count, BLOCK).amin(-1)[:, None, :]
    number = torch.arange(count, device=ends.device)
    query, key = number[:, None], number[None, :]
    reaches = (key < query) & (latest > query * BLOCK)  # some key is seen by the first query of the block
    full = (key < query) & (earliest >= ((query + 1) * BLOCK).clamp(max=length))  # every key by every query
    partial = (reaches & ~full) | (key == query)  # (R, B, B)

    def sees(row, head, i, j):
        return (j <= i) & (i < ends[row, j])

    lists = [tensor for blocks in (partial, full) for tensor in _ordered(blocks[:, None])]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length))


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (how many, which) blocks of keys each block of queries looks at: (R, 1, B), (R, 1, B, B) int32."""
    which = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), which.to(torch.int32)

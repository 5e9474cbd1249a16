"""DeBERTa's disentangled attention in one pass over the scores: a Triton kernel for a GPU.

torch's gather, transposed addition and mask each walk over all (T, T) scores of all heads, which takes longer than the
network's own matrix products. Here no (T, T) table is ever written: scores, position terms, softmax and values go tile
by tile, with the running maximum and sum of arXiv 2205.14135.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import triton
import triton.language as tl

# tiles of queries and keys, warps and stages: the fastest of eight settings tried on an H200
_QUERIES, _KEYS, _WARPS, _STAGES = 64, 64, 4, 1


@triton.jit
def _kernel(
    q, k, v, to_position, of_position, rows, keep, out, scale, batch, length, width, heads, stride_row, stride_batch,
    PRECISION: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile, sequence, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, D)
    i = tile * QUERIES + tl.arange(0, QUERIES)
    real_i = i < length
    start = sequence.to(tl.int64) * stride_batch + head * D
    table = (head.to(tl.int64) * batch + sequence) * length * width
    to_position += table
    of_position += table
    queries = tl.load(q + start + i[:, None] * stride_row + d[None, :], mask=real_i[:, None], other=0.0)
    best = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, D], tl.float32)
    for first in range(0, length, KEYS):
        j = first + tl.arange(0, KEYS)
        real_j = j < length
        keys = tl.load(k + start + j[None, :] * stride_row + d[:, None], mask=real_j[None, :], other=0.0)
        scores = tl.dot(queries, keys, input_precision=PRECISION)  # (QUERIES, KEYS)
        both = real_i[:, None] & real_j[None, :]
        row = tl.load(rows + (i[:, None] - j[None, :] + length - 1), mask=both, other=0)
        scores += tl.load(to_position + i[:, None] * width + row, mask=both, other=0.0).to(tl.float32)
        # read with the queries side by side, as they lie, and turned around afterwards
        both = real_j[:, None] & real_i[None, :]
        row = tl.load(rows + (i[None, :] - j[:, None] + length - 1), mask=both, other=0)
        turned = tl.load(of_position + j[:, None] * width + row, mask=both, other=0.0)
        scores = (scores + tl.trans(turned).to(tl.float32)) * scale
        is_real = tl.load(keep + sequence * length + j, mask=real_j, other=0) != 0
        scores = tl.where(is_real[None, :], scores, -1e30)
        highest = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp(scores - highest[:, None])
        shrink = tl.exp(best - highest)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v + start + j[:, None] * stride_row + d[None, :], mask=real_j[:, None], other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        best = highest
    where = (sequence.to(tl.int64) * length + i)[:, None] * (heads * D) + head * D + d[None, :]
    tl.store(out + where, (mixed / total[:, None]).to(out.dtype.element_ty), mask=real_i[:, None])


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, to_position: torch.Tensor, of_position: torch.Tensor,
    rows: torch.Tensor, keep: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """(B, T, h, d): softmax((q k + their position terms) * scale) v. As plain_attention of _deberta.py, for a GPU.

    query, key, value: (B, T, h, d) with the same strides, the last two contiguous; d a power of 2 from 16 on.
    to_position, of_position: (h, B, T, R), contiguous: each query's, and each key's, product with the R position rows.
    rows: (2T - 1,): which row belongs to i - j = -(T - 1), ..., T - 1. keep: (B, T), contiguous, 1 for real tokens.
    """
    batch, length, heads, size = query.shape
    if not all(x.is_contiguous() for x in (to_position, of_position, rows, keep)):
        raise ValueError("a table is not contiguous: the kernel would read other rows")
    out = query.new_empty(batch, length, heads, size)
    precision = "ieee" if query.dtype == torch.float32 else "tf32"  # the latter is not used in half precision
    # Triton types a launch as the kernel itself, which has no num_warps and num_stages
    launch = cast(Callable[..., object], _kernel[(triton.cdiv(length, _QUERIES), batch, heads)])
    launch(
        query, key, value, to_position, of_position, rows, keep, out, scale, batch, length, to_position.shape[-1],
        heads, query.stride(1), query.stride(0), PRECISION=precision, D=size, QUERIES=_QUERIES, KEYS=_KEYS,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return out

"""Texts in batches of like length, and the device and precision that they are computed in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def batches(lengths: Sequence[int], batch_tokens: int, batch_scores: int = 1 << 62) -> Iterator[list[int]]:
    """Indices of texts, longest first, in batches of neighbours in length, so that little is padding.

    A batch has batch_tokens tokens and batch_scores (T, T) scores at most, padding included, or one text.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        stop = start + max(1, min(batch_tokens // longest, batch_scores // longest**2))
        yield order[start:stop]
        start = stop


def device_and_dtype() -> tuple[str, torch.dtype]:
    """The GPU if there is one, in bfloat16 (float16 where the GPU has none), else the CPU in float32."""
    import torch  # here: a ranking that is done already needs none

    if not torch.cuda.is_available():
        return "cpu", torch.float32
    return "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

"""DeBERTa-v2's disentangled attention, for inference: the same numbers as transformers' module in fewer passes.

transformers projects the position tables anew in each layer of each batch and copies them for every sequence, scores
all 512 positions however short the text, and walks over the (T, T) scores about twelve times. Here the tables are
projected once a layer, only the positions that T tokens can have are scored, all sequences share them, and one bias
goes into torch's fused attention. arXiv 2006.03654, equation 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from sppo.command.errors import first_line


def speed_up(model: Any) -> None:
    """Swap the attention of a DebertaV2Model in eval mode, in place; its parameters and their names stay.

    Does nothing for a config without both position terms on shared keys, which no PairRM has.
    """
    config = model.config
    attention = model.encoder.layer[0].attention.self
    terms = set(getattr(config, "pos_att_type", None) or [])
    if not (attention.relative_attention and attention.share_att_key and terms == {"c2p", "p2c"}):
        return
    for layer in model.encoder.layer:
        layer.attention.self = Attention(layer.attention.self)
    model.encoder.get_rel_pos = lambda *_: None  # each length's positions are in a cache instead


class Attention(nn.Module):
    """Wraps transformers' DisentangledSelfAttention and answers as it does. h: heads, d: their width."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        # one product instead of three
        self.project = nn.Linear(source.query_proj.in_features, 3 * source.all_head_size, device="meta")
        parts = (source.query_proj, source.key_proj, source.value_proj)
        self.project.weight = nn.Parameter(torch.cat([p.weight for p in parts]), requires_grad=False)
        self.project.bias = nn.Parameter(torch.cat([p.bias for p in parts]), requires_grad=False)
        self.heads, self.width = source.num_attention_heads, source.attention_head_size
        self.span = source.pos_ebd_size
        self.buckets = source.position_buckets
        self.furthest = source.max_relative_positions
        self.scale = 1 / math.sqrt(self.width * 3)  # content-content, content-position, position-content
        # the position table projected to keys and to queries, (h, d, 2 span) each; weights do not change in inference
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.heads, self.width)  # (..., H) -> (..., h, d)

    def _position_terms(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Each token's products with R rows of a table, (B, T, h, d) and (h, d, R) -> (h, B, T, R)."""
        batch, length = x.shape[:2]
        of_heads = x.flatten(0, 1).transpose(0, 1)  # (h, B T, d)
        return (of_heads @ table).view(self.heads, batch, length, -1)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, *_: Any, rel_embeddings: Any = None, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: (B, T, H); attention_mask: (B, 1, T, T), 1 where both tokens are real. Returns (B, T, H)."""
        query, key, value = map(self._split, self.project(hidden_states).chunk(3, -1))  # (B, T, h, d)
        if self._tables is None:
            of_query, of_key, _ = self.project(rel_embeddings[: 2 * self.span]).chunk(3, -1)  # (2 span, H)
            self._tables = self._split(of_key).permute(1, 2, 0), self._split(of_query).permute(1, 2, 0)
        key_table, query_table = self._tables

        length, device = hidden_states.shape[1], hidden_states.device
        used = _positions(length, self.span, self.buckets, self.furthest, device)
        to_position = self._position_terms(query, key_table[..., used.low : used.high])
        of_position = self._position_terms(key, query_table[..., used.low : used.high])
        # (B, T): the first token is real, so its row says which keys are
        keep = attention_mask[:, 0, 0].contiguous()
        attend = _fastest_attention(device, self.width, hidden_states.dtype)
        return attend(query, key, value, to_position, of_position, used.rows, keep, self.scale).flatten(2), None


@lru_cache
def _fastest_attention(device: torch.device, width: int, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """attention of _attention.py on a GPU where it works and agrees with plain_attention, else the latter."""
    if device.type != "cuda" or width not in (16, 32, 64, 128):
        return plain_attention
    heads, batch, length, rows = 2, 3, 72, 24  # no multiple of a tile, and padding
    make = torch.Generator(device).manual_seed(0)
    whole = torch.randn(batch, length, 3, heads, width, generator=make, device=device).to(dtype)
    query, key, value = whole.unbind(2)
    tables = torch.randn(2, heads, batch, length, rows, generator=make, device=device).to(dtype)
    to_position, of_position = tables.unbind(0)
    row = torch.randint(rows, (2 * length - 1,), generator=make, device=device, dtype=torch.int32)
    keep = torch.ones(batch, length, device=device, dtype=torch.int64)
    keep[1, length // 2 :] = 0
    asked = (query, key, value, to_position, of_position, row, keep, 0.1)
    try:
        from sppo.rankers._attention import attention

        apart = (attention(*asked) - plain_attention(*asked)).abs().max().item()
        trouble = f"it is {apart:.2g} apart from torch's" if apart > (1e-4 if dtype == torch.float32 else 3e-2) else ""
    except Exception as error:  # noqa: BLE001 - no compiler, another Triton: the other way gives the same numbers
        trouble = first_line(error)
    if trouble:
        print(f"rank: the Triton kernel does not work here ({trouble}), so ranking takes twice as long", flush=True)
        return plain_attention
    return attention


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, to_position: torch.Tensor, of_position: torch.Tensor,
    rows: torch.Tensor, keep: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """As attention of _attention.py, by torch's own operations."""
    full = (*to_position.shape[:-1], to_position.shape[2])  # (h, B, T, T)
    tokens = torch.arange(full[-1], device=rows.device)
    row = rows[tokens[:, None] - tokens + len(tokens) - 1].long()  # (T, T): of query i and key j
    bias = to_position.gather(-1, row.expand(full))
    bias += of_position.gather(-1, row.T.expand(full)).transpose(-1, -2)
    bias *= scale
    bias.masked_fill_(keep[:, None] == 0, torch.finfo(bias.dtype).min)
    query, key, value = (x.movedim(2, 0) for x in (query, key, value))  # (h, B, T, d)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale).movedim(0, 2)


class _Positions(NamedTuple):
    """What T tokens use of a position table: its rows low to high - 1.

    rows: (2T - 1,), for each offset i - j = -(T - 1), ..., T - 1 of query i and key j the row inside this slice.
    """

    low: int
    high: int
    rows: torch.Tensor


@lru_cache(maxsize=64)
def _positions(length: int, span: int, buckets: int, furthest: int, device: torch.device) -> _Positions:
    """What `length` tokens use of a table of 2 `span` rows: `span` is offset 0, offsets far away share a bucket."""
    relative = torch.arange(1 - length, length)
    if buckets > 0 and furthest > 0:
        relative = make_log_bucket_position(relative, buckets, furthest).long()
    rows = (relative + span).clamp(0, 2 * span - 1)
    low, high = int(rows.min()), int(rows.max()) + 1
    if device.type == "cuda":  # matrix products are slow where a row does not start at a multiple of 16 bytes
        low = max(0, low - -(high - low) % 8)
        high = min(2 * span, high + -(high - low) % 8)
    return _Positions(low, high, (rows - low).to(device, torch.int32))

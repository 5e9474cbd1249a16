"""DeBERTa-v2's disentangled attention, for inference: the same numbers as transformers' module in fewer passes.

transformers projects the position tables anew in each layer of each batch and copies them for every sequence, scores
all 512 positions however short the text, and walks over the (T, T) scores about twelve times. Here the tables are
projected once a layer, only the positions that T tokens can have are scored, all sequences share them, and one bias
goes into torch's fused attention. arXiv 2006.03654, equation 4.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position


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
        self.query_proj, self.key_proj, self.value_proj = source.query_proj, source.key_proj, source.value_proj
        self.heads, self.width = source.num_attention_heads, source.attention_head_size
        self.span, self.buckets, self.furthest = (
            source.pos_ebd_size,
            source.position_buckets,
            source.max_relative_positions,
        )
        self.scale = math.sqrt(self.width * 3)  # content-content, content-position, position-content
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.heads, self.width).movedim(-2, 0)  # (..., H) -> (h, ..., d)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, *_: Any, rel_embeddings: Any = None, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: (B, T, H); attention_mask: (B, 1, T, T), 1 where both tokens are real. Returns (B, T, H)."""
        batch, length, _size = hidden_states.shape
        query = self._split(self.query_proj(hidden_states) / self.scale)  # (h, B, T, d)
        key, value = self._split(self.key_proj(hidden_states)), self._split(self.value_proj(hidden_states))
        if self._tables is None:  # weights do not change in inference
            table = rel_embeddings[: 2 * self.span]
            self._tables = self._split(self.key_proj(table)), self._split(self.query_proj(table) / self.scale)
        low, high, from_query, from_key = _positions(
            length, self.span, self.buckets, self.furthest, hidden_states.device
        )
        keys, queries = (table[:, low:high].transpose(1, 2) for table in self._tables)  # (h, d, R)
        flat = (self.heads, batch * length, self.width)
        full = (self.heads, batch, length, length)
        to_position = (query.reshape(flat) @ keys).view(self.heads, batch, length, -1)  # (h, B, T, R)
        of_position = (key.reshape(flat) @ queries).view(self.heads, batch, length, -1)
        bias = to_position.gather(-1, from_query.expand(full))
        bias += of_position.gather(-1, from_key.expand(full)).transpose(-1, -2)
        bias.masked_fill_(~attention_mask.bool().squeeze(1), torch.finfo(bias.dtype).min)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)  # (h, B, T, d)
        return context.movedim(0, -2).reshape(batch, length, -1), None


@lru_cache(maxsize=64)
def _positions(
    length: int, span: int, buckets: int, furthest: int, device: torch.device
) -> tuple[int, int, torch.Tensor, torch.Tensor]:
    """Which rows of the position tables `length` tokens ask for: (the first, the one behind the last, (T, T) rows for
    query i and key j, (T, T) rows for key i and query j), the last two counted from the first."""
    tokens = torch.arange(length)
    relative = tokens[:, None] - tokens[None]  # (T, T), i - j
    if buckets > 0 and furthest > 0:
        relative = make_log_bucket_position(relative, buckets, furthest).long()
    from_query = (relative + span).clamp(0, 2 * span - 1)
    from_key = (span - relative).clamp(0, 2 * span - 1)
    low = int(min(from_query.min(), from_key.min()))
    high = int(max(from_query.max(), from_key.max())) + 1
    return low, high, (from_query - low).to(device), (from_key - low).to(device)

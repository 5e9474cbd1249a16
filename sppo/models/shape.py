"""The shape of a causal model, as far as memory and time follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Shape:
    """What a config.json says of a causal model, and its number of parameters."""

    parameters: int
    layers: int
    hidden: int
    heads: int
    kv_width: int  # numbers in a token's keys, in one layer
    bytes: int  # of one stored weight

    @classmethod
    def of(cls, config: dict[str, Any], parameters: int) -> Shape:
        """From config.json as read; a key that an architecture does not have counts nothing."""
        text = config.get("text_config") or config
        heads, hidden = text.get("num_attention_heads") or 1, text.get("hidden_size") or 0
        head_width = text.get("head_dim") or hidden // heads
        return cls(
            parameters=parameters,
            layers=text.get("num_hidden_layers") or 0,
            hidden=hidden,
            heads=heads,
            kv_width=(text.get("num_key_value_heads") or heads) * head_width,
            bytes=stored_bytes(config),
        )

    def cache(self, tokens: int, number: int = 2) -> int:
        """Bytes of the keys and values of so many tokens, `number` bytes for each number."""
        return 2 * number * self.layers * self.kv_width * tokens


def stored_bytes(config: dict[str, Any]) -> int:
    """Bytes of one stored weight, by config.json's dtype."""
    kind = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return {"float32": 4, "float64": 8}.get(kind.removeprefix("torch."), 2)

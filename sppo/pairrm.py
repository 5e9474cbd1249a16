"""PairRM (llm-blender) on plain transformers: which of two responses is better, and by how much.

DeBERTa-v2 with a two-layer head. Reads both published layouts: llm-blender/PairRM (ranker settings that name a
base model, of which only the config and tokenizer are used) and llm-blender/PairRM-hf (one transformers directory).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sppo.errors import SPPOError
from sppo.models import ranker_base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE, CANDIDATE1, CANDIDATE2, CANDIDATE = "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"


class PairRMModel(nn.Module):
    """The network: parameters are named as in the published checkpoint."""

    def __init__(self, config: Any, n_tasks: int, dropout: float) -> None:
        super().__init__()
        from transformers import DebertaV2Model

        width = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(2 * width, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, n_tasks)
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Logits (B,), positive where the first candidate is better.

        input_ids, attention_mask: (B, T). places: (B, 3), where the source, candidate 1 and candidate 2 prefixes are.
        """
        hidden = self.pretrained_model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state  # (B, T, H)
        source, first, second = hidden[torch.arange(len(hidden), device=hidden.device)[:, None], places].unbind(1)
        left = self.head_layer(torch.cat([source, first], -1))  # (B, n_tasks)
        right = self.head_layer(torch.cat([source, second], -1))
        return (left - right).mean(-1)


class PairRM:
    """A loaded ranker: builds the inputs and answers pairs in batches of a token budget."""

    def __init__(self, directory: Path, device: str, batch_tokens: int) -> None:
        config, tokenizer, weights, settings = _read_checkpoint(directory)
        self.device, self.batch_tokens = device, batch_tokens
        self.cut = 0  # texts that did not fit their budget, so far
        self.tokenizer = tokenizer
        self.source_maxlength: int = settings["source_maxlength"]
        self.candidate_maxlength: int = settings["candidate_maxlength"]
        self.prefix_ids: dict[str, int] = settings["prefix_ids"]
        self.control_ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} | set(self.prefix_ids.values())
        self.control_text = [t for t in [*tokenizer.all_special_tokens, *self.prefix_ids] if t != tokenizer.sep_token]
        model = PairRMModel(config, settings["n_tasks"], 0.0)
        _load_strictly(model, weights, directory)
        half = device != "cpu" and torch.cuda.is_bf16_supported()
        self.model = model.to(device, torch.bfloat16 if half else torch.float32).eval()

    def encode_source(self, text: str) -> list[int]:
        """`[CLS]<|source|>text[SEP]`, cut on the right to source_maxlength tokens in all."""
        return self._encode(SOURCE, text, self.source_maxlength)

    def encode_candidate(self, text: str, source_length: int) -> list[int]:
        """`[CLS]<|candidate|>text[SEP]`, cut to candidate_maxlength and half of what its own source left over."""
        spare = (self.source_maxlength - source_length) // 2
        return self._encode(CANDIDATE, text, self.candidate_maxlength + spare)

    def _encode(self, prefix: str, text: str, limit: int) -> list[int]:
        ids = self._text_ids(text)
        self.cut += len(ids) > limit - 3
        return [self.tokenizer.cls_token_id, self.prefix_ids[prefix], *ids[: limit - 3], self.tokenizer.sep_token_id]

    def _text_ids(self, text: str) -> list[int]:
        """Text is data: no control token comes out of it, whatever it spells. [SEP] becomes a space, as in
        llm-blender; another control token's name is broken by a space."""
        text = text.replace(self.tokenizer.sep_token, " ")
        for name in self.control_text:
            text = text.replace(name, f"{name[0]} {name[1:]}")
        ids = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        return [self.tokenizer.unk_token_id if i in self.control_ids else i for i in ids]

    def pair_input(self, source: list[int], first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
        """(token ids, the three prefixes' places) of one comparison."""
        places = [1, len(source) + 1, len(source) + len(first) + 1]
        ids = source + first + second
        ids[places[1]], ids[places[2]] = self.prefix_ids[CANDIDATE1], self.prefix_ids[CANDIDATE2]
        return ids, places

    @torch.inference_mode()
    def logits(self, inputs: list[tuple[list[int], list[int]]]) -> list[float]:
        """One logit for each of `inputs` (from pair_input), in their order.

        Sorted by length and packed to batch_tokens, so that little is padding. A logit that is not finite is
        asked again alone in float32 before it is given back as it is.
        """
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i][0]))
        answers = [0.0] * len(inputs)
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and len(inputs[order[stop]][0]) * (stop + 1 - start) <= self.batch_tokens:
                stop += 1
            chosen = order[start:stop]
            for i, logit in zip(chosen, self.forward([inputs[i] for i in chosen]).tolist(), strict=True):
                answers[i] = logit
            start = stop
        self._retry([i for i, a in enumerate(answers) if a - a != 0], inputs, answers)
        return answers

    def forward(self, inputs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        """Logits (B,) of one batch, float32."""
        width = max(len(ids) for ids, _ in inputs)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([i + [pad] * (width - len(i)) for i, _ in inputs], device=self.device)  # (B, T)
        mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in inputs], device=self.device)
        places = torch.tensor([p for _, p in inputs], device=self.device)  # (B, 3)
        return self.model(ids, mask, places).float()

    def _retry(self, bad: list[int], inputs: list[tuple[list[int], list[int]]], answers: list[float]) -> None:
        if not bad or next(self.model.parameters()).dtype == torch.float32:
            return
        dtype = next(self.model.parameters()).dtype
        self.model.float()
        for i in bad:
            answers[i] = self.forward([inputs[i]]).item()
        self.model.to(dtype)


def _read_checkpoint(directory: Path) -> tuple[Any, PreTrainedTokenizerBase, dict[str, torch.Tensor], dict[str, Any]]:
    """(DeBERTa config, tokenizer, weights, settings) of either layout."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer

    raw = json.loads((directory / "config.json").read_text())
    weights_path = directory / "model.safetensors"
    if not weights_path.exists():
        raise SPPOError(f"ranker {directory}: no model.safetensors in it (pickled weights are not read)")
    weights = load_file(weights_path)
    if "model_name" in raw:  # llm-blender/PairRM
        base = ranker_base(directory)
    else:  # llm-blender/PairRM-hf
        base = directory
    config = AutoConfig.from_pretrained(base)
    if config.model_type != "deberta-v2":
        raise SPPOError(f"ranker {directory}: a {config.model_type} is not a PairRM; its base is deberta-v2")
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise SPPOError(f"ranker {directory}: its tokenizer cannot be loaded: {error}") from None
    # Added tokens, in this order, behind the tokenizer's own; a tokenizer saved with them has them already.
    names = [SOURCE, CANDIDATE1, CANDIDATE2, CANDIDATE]
    vocabulary = tokenizer.get_vocab()
    first_free = len(vocabulary)
    ids = {name: vocabulary.get(name, first_free + i) for i, name in enumerate(names)}
    for key, name in (("source_prefix_id", SOURCE), ("cand1_prefix_id", CANDIDATE1), ("cand2_prefix_id", CANDIDATE2)):
        if raw.get(key, ids[name]) != ids[name]:
            raise SPPOError(f"ranker {directory}: config.json has {key} {raw[key]}, its tokenizer {ids[name]}")
    embedding = weights.get("pretrained_model.embeddings.word_embeddings.weight")
    if embedding is None or len(embedding) <= max(ids.values()):
        rows = "no" if embedding is None else len(embedding)
        raise SPPOError(
            f"ranker {directory}: {rows} embedding rows do not fit its tokenizer of {max(ids.values()) + 1}"
        )
    config.vocab_size = len(embedding)
    settings = {
        "source_maxlength": raw.get("source_maxlength") or 1224,
        "candidate_maxlength": raw.get("candidate_maxlength") or 412,
        "n_tasks": raw.get("n_tasks") or 1,
        "prefix_ids": ids,
    }
    return config, tokenizer, weights, settings


def _load_strictly(model: nn.Module, weights: dict[str, torch.Tensor], directory: Path) -> None:
    """A key missing or left over is an error, but for the position_ids buffer that older checkpoints carry."""
    weights = {k: v for k, v in weights.items() if not k.endswith("embeddings.position_ids")}
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise SPPOError(f"ranker {directory} does not fit a PairRM: {error}") from None


def load_pairrm(directory: Path, batch_tokens: int) -> PairRM:
    """PairRM on the GPU if there is one (bfloat16), else the CPU (float32)."""
    return PairRM(directory, "cuda" if torch.cuda.is_available() else "cpu", batch_tokens)

"""PairRM's network and what it reads: DeBERTa-v2 with a two-layer head, and its answers in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from sppo.command.errors import SPPOError
from sppo.models.loading import disable_cudnn_attention, loading
from sppo.rankers._deberta import speed_up
from sppo.rankers._normalizer import restore_normalizer
from sppo.rankers.batching import batches
from sppo.rankers.pairrm import ranker_base
from sppo.schema import Message, Pair, prompt_text
from sppo.store.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALIGNED = 8  # a GPU's fused attention wants its (T, T) scores in rows of a multiple of this
SOURCE, CANDIDATE1, CANDIDATE2, CANDIDATE = "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"


class Input(NamedTuple):
    """The token ids of one comparison, and where in them its three prefixes are."""

    ids: list[int]
    places: list[int]


class Batch(NamedTuple):
    """The arguments of PairRMModel.forward."""

    input_ids: torch.Tensor  # (B, T)
    attention_mask: torch.Tensor  # (B, T), 1 for real tokens
    places: torch.Tensor  # (B, 3), where the source, candidate 1 and candidate 2 prefixes are


class PairRMModel(nn.Module):
    """The network: parameters are named as in the published checkpoint."""

    def __init__(self, config: Any, n_tasks: int = 1) -> None:
        super().__init__()
        from transformers import DebertaV2Model

        width = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            # Identity: where the published network has its dropout, so that the layers' numbers are the same
            nn.Identity(), nn.Linear(2 * width, width), nn.Tanh(), nn.Identity(), nn.Linear(width, n_tasks)
        )  # fmt: skip

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Logits (B,), positive where the first candidate is better.

        The arguments are a Batch.
        """
        output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state  # (B, T, H)
        each = torch.arange(len(hidden), device=hidden.device)[:, None]  # (B, 1)
        source, first, second = hidden[each, places].unbind(1)  # (B, H) each
        left = self.head_layer(torch.cat([source, first], -1))  # (B, n_tasks)
        right = self.head_layer(torch.cat([source, second], -1))
        return (left - right).mean(-1)


class PairInputs:
    """Texts as PairRM's token ids: what it reads of them, and how much is cut."""

    def __init__(self, directory: Path, render: Callable[[list[Message]], str] = prompt_text) -> None:
        self.render = render
        settings = read_json(directory / "config.json")
        if not (directory / "model.safetensors").exists():
            raise SPPOError(f"ranker {directory}: no model.safetensors in it (pickled weights are not read)")
        self.config, self.tokenizer = _read_base(directory)
        self.prefix_ids = _prefix_ids(self.tokenizer, settings, directory)
        self.config.vocab_size = _embedding_rows(directory, wanted=max(self.prefix_ids.values()) + 1)
        # in tokens, CLS, prefix and SEP included: of the prompt at most, of a response at least (see _candidate_limit)
        self.source_maxlength: int = settings.get("source_maxlength") or 1224
        self.candidate_maxlength: int = settings.get("candidate_maxlength") or 412
        self.n_tasks: int = settings.get("n_tasks") or 1

        tokenizer = self.tokenizer
        special = tokenizer.special_tokens_map  # every DeBERTa-v2 tokenizer has these three
        self.sep_token = special["sep_token"]
        ids = tokenizer.convert_tokens_to_ids([special["cls_token"], self.sep_token, special["unk_token"]])
        assert isinstance(ids, list)  # a list for a list
        self.cls_id, self.sep_id, self.unk_id = ids

        self.control_ids = set(tokenizer.all_special_ids) - {self.unk_id} | set(self.prefix_ids.values())
        self.control_text = [t for t in [*tokenizer.all_special_tokens, *self.prefix_ids] if t != self.sep_token]
        self.text_ids = lru_cache(maxsize=4096)(self._text_ids)  # a text stands in up to 2K pairs

    def _text_ids(self, text: str) -> list[int]:
        """The token ids of a text, none of them a control token, whatever the text spells.

        [SEP] becomes a space, as in llm-blender; a space parts the name of any other control token.
        """
        text = text.replace(self.sep_token, " ")
        for name in self.control_text:
            text = text.replace(name, f"{name[0]} {name[1:]}")
        ids = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        return [self.unk_id if i in self.control_ids else i for i in ids]

    def _wrap(self, prefix: str, ids: list[int], limit: int) -> list[int]:
        return [self.cls_id, self.prefix_ids[prefix], *ids[: limit - 3], self.sep_id]

    def _candidate_limit(self, source_length: int) -> int:
        """candidate_maxlength and half of what the pair's own source left over of source_maxlength."""
        return self.candidate_maxlength + (self.source_maxlength - source_length) // 2

    def encode(self, prompt: list[Message], first: str, second: str) -> Input:
        """`[CLS]<|source|>prompt[SEP]` and the two candidates likewise, one behind the other.

        Each is cut on the right to its budget, CLS, prefix and SEP included.
        """
        source = self._wrap(SOURCE, self.text_ids(self.render(prompt)), self.source_maxlength)
        limit = self._candidate_limit(len(source))
        left = self._wrap(CANDIDATE1, self.text_ids(first), limit)
        right = self._wrap(CANDIDATE2, self.text_ids(second), limit)
        return Input(source + left + right, [1, len(source) + 1, len(source) + len(left) + 1])

    def count_cut(self, prompt: list[Message], responses: Sequence[str]) -> int:
        """How many of the texts do not fit their budgets."""
        text = self.text_ids(self.render(prompt))
        limit = self._candidate_limit(min(len(text) + 3, self.source_maxlength))
        cut = len(text) > self.source_maxlength - 3
        return cut + sum(len(self.text_ids(r)) > limit - 3 for r in responses)

    def padded(self, inputs: list[Input], device: str) -> Batch:
        """Inputs as one batch, padded on the right."""
        width = max(len(item.ids) for item in inputs)
        if device != "cpu":
            width = -(-width // _ALIGNED) * _ALIGNED
        ids = np.full((len(inputs), width), self.tokenizer.pad_token_id)  # (B, T)
        mask = np.zeros_like(ids)
        for row, item in enumerate(inputs):
            ids[row, : len(item.ids)] = item.ids
            mask[row, : len(item.ids)] = 1
        places = torch.tensor([item.places for item in inputs])
        return Batch(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device), places.to(device))


class PairRM:
    """A loaded ranker that answers pairs in batches of a token budget.

    dtype: of the weights; what is not finite in half precision is asked again in float32.
    """

    batched = True

    def __init__(
        self,
        directory: Path,
        device: str,
        batch_tokens: int,
        dtype: torch.dtype = torch.float32,
        render: Callable[[list[Message]], str] = prompt_text,
    ) -> None:
        self.directory, self.device, self.batch_tokens = directory, device, batch_tokens
        # (T, T) scores in a batch: a CPU is slower on more than its cache holds
        self.batch_scores = 1 << 18 if device == "cpu" else 1 << 62
        disable_cudnn_attention()
        self.inputs = PairInputs(directory, render)
        self.count_cut = self.inputs.count_cut
        self.model = self._network().to(device, dtype)
        speed_up(self.model.pretrained_model)
        self._exact: PairRMModel | None = None  # in float32, made when it is needed

    def _network(self) -> PairRMModel:
        model = PairRMModel(self.inputs.config, self.inputs.n_tasks)
        load_strictly(model, self.directory)
        return model.eval()

    def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        """(index, logit) of every pair, longest pairs first.

        Sorted by length and packed to batch_tokens, so that little is padding. A GPU computes a batch while the next
        one is put together. A logit that is not finite in half precision is asked again alone in float32 before it is
        given back as it is.
        """
        inputs = [self.inputs.encode(*pair) for pair in pairs]
        running: list[tuple[list[int], torch.Tensor]] = []
        for chosen in batches([len(item.ids) for item in inputs], self.batch_tokens, self.batch_scores):
            running.append((chosen, self._forward(self.model, [inputs[i] for i in chosen])))
            if len(running) > 1:
                yield from self._read(inputs, *running.pop(0))
        for batch in running:
            yield from self._read(inputs, *batch)

    def _read(self, inputs: list[Input], chosen: list[int], logits: torch.Tensor) -> Iterator[tuple[int, float]]:
        """Wait for a batch's logits, (B,)."""
        for i, logit in zip(chosen, logits.tolist(), strict=True):
            yield i, logit if isfinite(logit) else self._exactly(inputs[i])

    def _exactly(self, item: Input) -> float:
        if next(self.model.parameters()).dtype == torch.float32:
            return float("nan")
        if self._exact is None:
            self._exact = self._network().to(self.device)
        return self._forward(self._exact, [item]).item()

    @torch.inference_mode()
    def _forward(self, model: PairRMModel, inputs: list[Input]) -> torch.Tensor:
        """(B,), float32: one logit for each input, in one batch. A GPU may still be computing them."""
        try:
            return model(*self.inputs.padded(inputs, self.device)).float()
        except torch.OutOfMemoryError:
            raise SPPOError(
                f"out of memory ranking {len(inputs)} pairs of up to {max(len(item.ids) for item in inputs)} tokens at "
                f"once; lower --batch_tokens {self.batch_tokens} and run the same command to go on"
            ) from None


def _read_base(directory: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """(DeBERTa config, tokenizer) of a PairRM of either layout. Raises SPPOError where its base is another network."""
    from transformers import AutoConfig, AutoTokenizer

    base = ranker_base(directory)
    with loading(f"ranker {directory}"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if config.model_type != "deberta-v2":
        raise SPPOError(
            f"ranker {directory}: a {config.model_type} is not a PairRM; its base is deberta-v2. For a causal LM pass "
            "--ranker_backend pair-lm, for a classifier with one label reward-model"
        )
    with loading(f"ranker {directory}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        restore_normalizer(tokenizer, base)
    return config, tokenizer


def _prefix_ids(tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], directory: Path) -> dict[str, int]:
    """Token ids of the prefixes, by name. Raises SPPOError where config.json has others.

    They come in this order behind the tokenizer's own tokens; a tokenizer that was saved with them has them already.
    """
    vocabulary = tokenizer.get_vocab()
    names = (SOURCE, CANDIDATE1, CANDIDATE2, CANDIDATE)
    ids = {name: vocabulary.get(name, len(vocabulary) + i) for i, name in enumerate(names)}
    for key, name in (("source_prefix_id", SOURCE), ("cand1_prefix_id", CANDIDATE1), ("cand2_prefix_id", CANDIDATE2)):
        if settings.get(key, ids[name]) != ids[name]:
            raise SPPOError(f"ranker {directory}: config.json has {key} {settings[key]}, its tokenizer {ids[name]}")
    return ids


def _embedding_rows(directory: Path, wanted: int) -> int:
    """Rows of the embedding in model.safetensors. Raises SPPOError where there are fewer than `wanted`."""
    name = "pretrained_model.embeddings.word_embeddings.weight"
    with loading(f"ranker {directory}"), safe_open(directory / "model.safetensors", "pt") as weights:
        rows = weights.get_slice(name).get_shape()[0] if name in weights.keys() else 0  # noqa: SIM118 - not a dict
    if rows < wanted:
        raise SPPOError(f"ranker {directory}: {rows or 'no'} embedding rows do not fit its tokenizer of {wanted}")
    return rows


def load_strictly(model: nn.Module, directory: Path) -> None:
    """Read model.safetensors into the model. Raises SPPOError where a key is missing or left over.

    The position_ids buffer does not count: older checkpoints have it.
    """
    with loading(f"ranker {directory}"):
        weights = load_file(directory / "model.safetensors")
    weights = {k: v for k, v in weights.items() if not k.endswith("embeddings.position_ids")}
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise SPPOError(f"ranker {directory} does not fit a PairRM: {error}") from None

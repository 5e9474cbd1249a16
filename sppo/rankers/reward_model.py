"""A reward model as the preference model: any sequence classifier with one label, C_ij = r_i - r_j.

Each distinct (prompt, response) is scored once, read by the reward model's own chat template. A decoder's reward is
read at its last token, an encoder's at its first; so both are kept where a text is too long for the context.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from sppo.command.errors import SPPOError
from sppo.command.importing import import_networks
from sppo.models.files import model_identity, resolve
from sppo.models.frames import date_identity
from sppo.models.loading import disable_cudnn_attention
from sppo.rankers._normalizer import normalizer_identity, restore_normalizer
from sppo.rankers.batching import device_and_dtype
from sppo.rankers.reading import Reader, context_of, system_identity
from sppo.rankers.scoring import Networks, Opened, load_network, open_directory, require_template, score
from sppo.recipe import Recipe
from sppo.schema import Message, Pair
from sppo.store.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Key = tuple[str, str]  # (prompt as JSON, response): what has one score
_CLASSIFIER = "AutoModelForSequenceClassification"


class RewardModel:
    """A loaded reward model, which scores texts in batches of at most batch_tokens tokens.

    dtype: of the weights; what is not finite in half precision is asked again in float32. date, system: as in Reader.
    """

    batched = True

    def __init__(
        self,
        directory: Path,
        device: str,
        batch_tokens: int,
        dtype: torch.dtype = torch.float32,
        date: str = "",
        system: Literal["keep", "drop"] = "keep",
    ) -> None:
        self.directory, self.device, self.batch_tokens = directory, device, batch_tokens
        disable_cudnn_attention()
        opened = _open_reward_model(directory)
        text = opened.config.get_text_config()
        self.networks = Networks(self._network, dtype)
        self.model: PreTrainedModel = self.networks.usual
        embeddings = self.model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        self.rows = embeddings.num_embeddings
        context = context_of(text, opened.tokenizer)
        self.reader = Reader(f"ranker {directory}", opened.tokenizer, context, self.rows, date, system)
        pad = getattr(text, "pad_token_id", None)
        self.pad = pad if pad is not None and 0 <= pad < self.rows else None

    def _network(self, dtype: torch.dtype) -> PreTrainedModel:
        """The network, its last layer in float32: bfloat16 would round a reward of 20 to eighths."""
        from transformers import AutoModelForSequenceClassification

        network = load_network(self.directory, AutoModelForSequenceClassification, self.device, dtype)
        head = getattr(network, "score", None) or getattr(network, "classifier", None)
        if isinstance(head, nn.Linear):
            head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        return network

    def count_cut(self, prompt: list[Message], responses: Sequence[str]) -> int:
        """How many of the texts do not fit the context."""
        return self.reader.count_cut(prompt, responses)

    def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        """(index, r(first) - r(second)) of every pair, as soon as both are scored; NaN where a text has no score."""
        keys = [tuple((json.dumps(prompt), text) for text in texts) for prompt, *texts in pairs]
        pairs_of: dict[Key, list[int]] = {}
        for index, both in enumerate(keys):
            for key in dict.fromkeys(both):
                pairs_of.setdefault(key, []).append(index)

        scores: dict[Key, float] = {}
        for key, reward in self._scores(list(pairs_of)):
            scores[key] = reward
            for index in pairs_of[key]:
                first, second = keys[index]
                if first in scores and second in scores:
                    yield index, scores[first] - scores[second]

    def _scores(self, keys: list[Key]) -> Iterator[tuple[Key, float]]:
        """(key, its reward), NaN where it has none, in the order in which batches are scored."""
        inputs = {key: ids for key in keys if (ids := self.reader.read(*key).ids)}
        yield from ((key, nan) for key in keys if key not in inputs)
        readable, texts = list(inputs), list(inputs.values())
        found = score(texts, [len(ids) for ids in texts], self.batch_tokens, self.networks, self._forward)
        yield from ((readable[i], reward) for i, [reward] in found)

    @torch.inference_mode()
    def _forward(self, network: PreTrainedModel, inputs: list[list[int]]) -> list[list[float]]:
        """One reward for each input, in one batch."""
        ids, mask = self.padded(network, inputs)
        return network(input_ids=ids, attention_mask=mask).logits.float().tolist()  # (B, 1)

    def padded(self, network: PreTrainedModel, inputs: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, attention_mask), both (B, T), padded on the right.

        Decoders read their reward at the last token that is not config.pad_token_id. Without one they read the last
        token and take no batch; they get one for the batch: a token that none of its texts has.
        """
        pad = self.pad
        if pad is None:
            used = {token for ids in inputs for token in ids}
            pad = next(token for token in range(self.rows) if token not in used)
            network.config.get_text_config().pad_token_id = pad
        width = max(len(ids) for ids in inputs)
        rows = [ids + [pad] * (width - len(ids)) for ids in inputs]
        mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in inputs]
        return torch.tensor(rows, device=self.device), torch.tensor(mask, device=self.device)


def _open_reward_model(directory: Path) -> Opened:
    """A reward model without its weights. Raises SPPOError for a directory that is none."""
    name = f"ranker {directory}"
    opened = open_directory(directory, "reward model")
    raw, config, tokenizer = opened
    if _CLASSIFIER in (raw.get("auto_map") or {}):
        raise SPPOError(f"{name} needs code that comes with its weights, which is not run; take another reward model")
    if config.model_type == "deberta-v2":
        restore_normalizer(tokenizer, directory)
    if config.num_labels != 1:
        made = ", ".join(raw.get("architectures") or ["an unknown kind"])
        hint = "; a causal LM is asked by --ranker_backend pair-lm" if made.endswith("ForCausalLM") else ""
        raise SPPOError(f"{name}: a reward model has one label; this one ({made}) has {config.num_labels}{hint}")
    require_template(directory, tokenizer)
    return opened


def fetch(recipe: Recipe) -> Path:
    """The reward model's directory, in the cache after this. Raises SPPOError where it is none."""
    directory = resolve(recipe.ranker, recipe.ranker_revision, "ranker")
    _open_reward_model(directory)
    return directory


def identity(recipe: Recipe) -> dict[str, Any]:
    """Weights, config, tokenizer and template of the reward model, the date that it writes, and --ranker_system."""
    directory = resolve(recipe.ranker, recipe.ranker_revision, "ranker")
    deberta = read_json(directory / "config.json").get("model_type") == "deberta-v2"
    characters = normalizer_identity(directory) if deberta else {}
    more = {**date_identity(recipe.date, directory, {}), **system_identity(recipe)}
    return {"backend": "reward-model", "ranker": model_identity(directory), **characters, **more}


def load(recipe: Recipe) -> RewardModel:
    """The reward model, ready to answer, on the device and in the precision of device_and_dtype."""
    import_networks()
    device, dtype = device_and_dtype()
    directory = resolve(recipe.ranker, recipe.ranker_revision, "ranker")
    return RewardModel(directory, device, recipe.batch_tokens, dtype, recipe.date, recipe.ranker_system)

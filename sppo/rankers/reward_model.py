"""A reward model as the preference model: any sequence classifier with one label, C_ij = r_i - r_j.

Each distinct (prompt, response) is scored once, read by the reward model's own chat template. A decoder's reward is
read at its last token, an encoder's at its first; so both are kept where a text is too long for the context.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from sppo.command.errors import SPPOError
from sppo.command.importing import import_networks
from sppo.models.files import is_adapter, model_identity, resolve
from sppo.models.frames import date_identity
from sppo.models.loading import disable_cudnn_attention, loading
from sppo.rankers._normalizer import normalizer_identity, restore_normalizer
from sppo.rankers.batching import batches, device_and_dtype
from sppo.rankers.reading import Reader, context_of, system_identity
from sppo.recipe import Recipe
from sppo.schema import Message, Pair
from sppo.store.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        config, tokenizer = _open_reward_model(directory)
        text = config.get_text_config()
        self.model = self._network(dtype)
        embeddings = self.model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        self.rows = embeddings.num_embeddings
        self.reader = Reader(f"ranker {directory}", tokenizer, context_of(text, tokenizer), self.rows, date, system)
        pad = getattr(text, "pad_token_id", None)
        self.pad = pad if pad is not None and 0 <= pad < self.rows else None
        self._exact: PreTrainedModel | None = None  # in float32, made when it is needed

    def _network(self, dtype: torch.dtype) -> PreTrainedModel:
        """The network, its last layer in float32: bfloat16 would round a reward of 20 to eighths."""
        network = _load_strictly(self.directory, self.device, dtype).eval()
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
        for key, score in self._scores(list(pairs_of)):
            scores[key] = score
            for index in pairs_of[key]:
                first, second = keys[index]
                if first in scores and second in scores:
                    yield index, scores[first] - scores[second]

    def _scores(self, keys: list[Key]) -> Iterator[tuple[Key, float]]:
        """(key, its reward), NaN where it has none. Sorted by length and packed to batch_tokens: little is padding.

        A reward that is not finite in half precision is asked again alone in float32.
        """
        inputs = {key: ids for key in keys if (ids := self.reader.read(*key).ids)}
        yield from ((key, nan) for key in keys if key not in inputs)
        readable = list(inputs)
        for batch in batches([len(ids) for ids in inputs.values()], self.batch_tokens):
            chosen = [readable[i] for i in batch]
            for key, score in zip(chosen, self._forward(self.model, [inputs[k] for k in chosen]), strict=True):
                yield key, score if isfinite(score) else self._exactly(inputs[key])

    def _exactly(self, ids: list[int]) -> float:
        if self.model.dtype == torch.float32:
            return nan
        if self._exact is None:
            self._exact = self._network(torch.float32)
        return self._forward(self._exact, [ids])[0]

    @torch.inference_mode()
    def _forward(self, network: PreTrainedModel, inputs: list[list[int]]) -> list[float]:
        """One reward for each input, in one batch."""
        ids, mask = self.padded(network, inputs)
        try:
            return network(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()  # (B, 1) -> B
        except torch.OutOfMemoryError:
            raise SPPOError(
                f"out of memory scoring {ids.shape[0]} texts of up to {ids.shape[1]} tokens at once; "
                f"lower --batch_tokens {self.batch_tokens} and run the same command to go on"
            ) from None

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


def _open_reward_model(directory: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """(config, tokenizer) of a reward model. Raises SPPOError for a directory that is none."""
    from transformers import AutoConfig, AutoTokenizer

    name = f"ranker {directory}"
    if not (directory / "config.json").exists():
        raise SPPOError(f"{name}: no config.json in it; merge a LoRA adapter into its base model first")
    raw = read_json(directory / "config.json")
    if "model_name" in raw or "source_prefix_id" in raw:
        raise SPPOError(f"{name} is a PairRM, not a reward model; pass --ranker_backend pairrm")
    if is_adapter(directory, "ranker"):
        raise SPPOError(f"{name} is an adapter; merge it into its base model first")
    if _CLASSIFIER in (raw.get("auto_map") or {}):
        raise SPPOError(f"{name} needs code that comes with its weights, which is not run; take another reward model")
    with loading(f"{name}: its config or tokenizer"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if config.model_type == "deberta-v2":
            restore_normalizer(tokenizer, directory)
    if config.num_labels != 1:
        made = ", ".join(raw.get("architectures") or ["an unknown kind"])
        raise SPPOError(f"{name}: a reward model has one label; this one ({made}) has {config.num_labels}")
    if not tokenizer.chat_template:
        raise SPPOError(
            f"{name}: its tokenizer has no chat template, so how it reads a conversation is not known; put the one it "
            "was trained with into the directory as chat_template.jinja"
        )
    return config, tokenizer


def _load_strictly(directory: Path, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """The network. A weight missing, left over or of another shape is an error: it would be random, or lost."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    text = config.get_text_config()
    text.use_cache = False
    options: dict[str, Any] = {"config": config, "dtype": dtype, "use_safetensors": True}
    if getattr(text, "attn_logit_softcapping", None):  # attention of other kinds ignores Gemma-2's caps
        options["attn_implementation"] = "eager"
    with loading(f"ranker {directory}"):
        network, report = AutoModelForSequenceClassification.from_pretrained(
            directory,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them
            **options,
        )
    wrong = [f"{what.replace('_', ' ')} {sorted(map(str, found))[:4]}" for what, found in report.items() if found]
    if wrong:
        raise SPPOError(f"ranker {directory} does not fit a {type(network).__name__}: {'; '.join(wrong)}")
    return network.to(device)


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

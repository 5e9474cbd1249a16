"""A reward model behind a server as the preference model: C_ij = r_i - r_j, one request for each (prompt, response).

The server is vLLM's /classify or /pooling, or SGLang's /classify. It gets token ids: the chat template is applied here,
by the tokenizer of --ranker, so that nothing is templated or given its first token twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import isclose, isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sppo.command.errors import SPPOError, UsageError
from sppo.command.importing import import_networks
from sppo.models.files import json_object, resolve, tokenizer_files
from sppo.models.frames import date_identity
from sppo.models.loading import loading
from sppo.rankers import TRIAL
from sppo.rankers.chat_server import ChatServer, ranker_server
from sppo.rankers.reading import Reader, system_identity
from sppo.recipe import Recipe
from sppo.schema import Message, Pair, content_id
from sppo.store.files import digest

if TYPE_CHECKING:
    from openai import OpenAI
    from transformers import PreTrainedTokenizerBase

# answers of several lengths and kinds: the rewards of all of them lie between 0 and 1 only where they are no rewards
_TRIALS = (*TRIAL[1:], "Two plus two is four, because two and two more make four.", "5", "!!! <a> !!!" * 9)


class _Way(NamedTuple):
    """How a server is asked for the reward of token ids: its path, and the field that the ids stand in."""

    path: str
    field: str


# vLLM's, SGLang's, and that of a vLLM whose model is not one to classify with
_WAYS = (_Way("/classify", "input"), _Way("/classify", "input_ids"), _Way("/pooling", "input"))
_OTHER_WAY = (400, 404, 405, 422)  # statuses that a server may answer to a way that is not its own


class RewardServer:
    """Asks the reward model's server, `ranker_concurrency` requests at once; when made, for trial texts first.

    Raises SPPOError where the server serves another model, or gives something else than one reward for a text.
    """

    batched = False

    def __init__(self, recipe: Recipe) -> None:
        if not recipe.ranker_url:
            raise UsageError("--ranker_backend reward-server needs --ranker_url, its server: http://localhost:8000/v1")
        self.server = ranker_server(recipe, "reward server")
        directory = _directory(recipe)
        tokenizer, config = _open_reading(directory)
        self.served, longest = self._served(recipe.ranker)
        limits = [config.get("max_position_embeddings"), tokenizer.model_max_length, longest]
        context = min(limit for limit in limits if limit)
        name, rows = f"ranker {directory}", config["vocab_size"]
        self.reader = Reader(name, tokenizer, context, rows, recipe.date, recipe.ranker_system)
        self.way = self._find_way(is_plain=config.get("problem_type") == "regression")

    def _served(self, ranker: str) -> tuple[str, int | None]:
        """(name of the served model that is `ranker`, by its name or directory; the tokens that the server takes)."""
        models = self.server.served()
        for model in models:
            root = getattr(model, "root", None)
            if ranker in (model.id, root) or _is_same_directory(ranker, root):
                longest = getattr(model, "max_model_len", None)
                return model.id, longest if isinstance(longest, int) and longest > 0 else None
        names = ", ".join(model.id for model in models) or "no model"
        raise SPPOError(
            f"{self.server.url} serves {names}, not {self.server.model_flag} {ranker}. If that is the same model, "
            f"start its server with --served-model-name {ranker}"
        )

    def count_cut(self, prompt: list[Message], responses: Sequence[str]) -> int:
        """How many of the texts do not fit the context of the model or of its server."""
        return self.reader.count_cut(prompt, responses)

    def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        """(index, r(first) - r(second)) as soon as both are known; NaN where a text has no reward.

        Raises SPPOError for what no further request would mend, and where a request failed once too often.
        """
        keys = [tuple((json.dumps(prompt), text) for text in texts) for prompt, *texts in pairs]
        pairs_of: dict[tuple[str, str], list[int]] = {}  # in which each text is
        for index, both in enumerate(keys):
            for key in dict.fromkeys(both):
                pairs_of.setdefault(key, []).append(index)

        texts, rewards = list(pairs_of), {}
        # read in this thread, where a template's time is limited
        inputs = (self.reader.read(*key).ids for key in texts)
        for place, reward in self.server.ask_all(inputs, self._ask):
            rewards[texts[place]] = reward
            for index in pairs_of[texts[place]]:
                first, second = keys[index]
                if first in rewards and second in rewards:
                    yield index, rewards[first] - rewards[second]

    def _ask(self, client: OpenAI, ids: list[int] | None) -> float:
        if ids is None:  # the chat template refuses the conversation
            return nan
        try:
            reward = self._reward(client, self.way, ids)
        except self.server.failures as error:
            self.server.set_aside(error, "a text")
            return nan
        if not isfinite(reward):
            self.server.note("a reward is not a finite number; its prompt is set aside")
        return reward

    def _reward(self, client: OpenAI, way: _Way, ids: list[int], activation: bool = False) -> float:
        """The reward of a text. Raises SPPOError where the server has read another one: some cut what is too long."""
        answer = self._post(client, way, ids, activation)
        read = _tokens_read(answer)
        if read not in (None, len(ids)):
            raise SPPOError(
                f"{self.server.url} reads {read} tokens where {len(ids)} were sent, so its rewards are of other texts. "
                "Start it so that it cuts no text: SGLang without --allow-auto-truncate"
            )
        return _one_number(self.server, answer)

    def _post(self, client: OpenAI, way: _Way, ids: list[int], activation: bool = False) -> Any:
        """The server's answer to a text. vLLM's default is the reward's sigmoid; older ones call it `activation`."""
        body: dict[str, Any] = {"model": self.served, way.field: ids}
        if way.field == "input":
            body |= {"use_activation": activation, "activation": activation}
        return self.server.post(client, way.path, body)

    def _find_way(self, is_plain: bool) -> _Way:
        """The way in which the server answers trial texts with one reward each.

        `is_plain`: the config says that the rewards have no activation that could be turned off.
        """
        refusals: list[Exception] = []
        with self.server.client() as client:
            for way in _WAYS:
                try:
                    self._try(client, way, is_plain)
                    return way
                except self.server.failures as error:
                    if getattr(error, "status_code", None) not in _OTHER_WAY:
                        raise self.server.failure(error) from None
                    refusals.append(error)
        # what the server says of the text tells more than that it has no such path
        told = [error for error in refusals if getattr(error, "status_code", None) not in (404, 405)]
        if told:
            raise self.server.failure(told[0]) from None
        raise SPPOError(
            f"{self.server.url} serves {self.served}, but no rewards: it has neither /classify nor /pooling. Start "
            "vLLM with --runner pooling, SGLang with --is-embedding"
        )

    def _try(self, client: OpenAI, way: _Way, is_plain: bool) -> None:
        """Ask for the rewards of trial texts. Raises SPPOError for answers that are no rewards of these texts."""
        url, rewards, squashed = self.server.url, [], []
        for response in _TRIALS:
            ids = self.reader.read(json.dumps(TRIAL[0]), response).ids
            if ids is None:
                raise SPPOError(f"{self.reader.name}: its chat template refuses a question and its answer")
            rewards.append(self._reward(client, way, ids))
            if way.field == "input":
                squashed.append(self._reward(client, way, ids, activation=True))

        if not all(map(isfinite, rewards)):
            raise SPPOError(f"{url} gives {rewards} for trial texts, not finite numbers")
        is_same = [isclose(*both, rel_tol=1e-3) for both in zip(rewards, squashed, strict=False)]
        if is_same and all(is_same) and all(0 <= reward <= 1 for reward in rewards) and not is_plain:
            raise SPPOError(
                f"{url} gives numbers between 0 and 1 for all trial texts, and heeds no use_activation: they seem to "
                "be probabilities, not rewards. Start vLLM with --pooler-config '{\"use_activation\": false}'"
            )


def _one_number(server: ChatServer, answer: Any) -> float:
    """The reward in a server's answer to one text. Raises SPPOError where it holds several numbers, or none."""
    if isinstance(answer, list):  # SGLang's, of several texts
        found: Any = [text["embedding"] for text in answer]
    elif "embedding" in answer:
        found = answer["embedding"]
    else:
        found = [text["probs"] if "probs" in text else text["data"] for text in answer["data"]]

    numbers = list(_flat(found))
    if len(numbers) != 1:
        raise SPPOError(f"{server.url} gives {len(numbers)} numbers for a text; a reward model gives one")
    return nan if numbers[0] is None else float(numbers[0])


def _flat(found: Any) -> Iterator[Any]:
    if not isinstance(found, list):
        yield found
        return
    for part in found:
        yield from _flat(part)


def _tokens_read(answer: Any) -> int | None:
    """How many tokens the server has read, where it says so."""
    text = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer  # SGLang's, of several texts
    told = text.get("usage") or text.get("meta_info") or {} if isinstance(text, dict) else {}
    return told.get("prompt_tokens")


def _is_same_directory(ranker: str, root: Any) -> bool:
    path = Path(ranker).expanduser()
    return isinstance(root, str) and path.is_dir() and Path(root).exists() and path.samefile(root)


def _directory(recipe: Recipe) -> Path:
    """Where the tokenizer and the config are: --ranker, or its small files from the Hub."""
    return resolve(recipe.ranker, recipe.ranker_revision, "ranker", weights=False)


def _open_reading(directory: Path) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """(tokenizer, the config of the model's text part). Raises SPPOError where they do not say how a text is read."""
    import_networks()
    from transformers import AutoTokenizer

    name = f"ranker {directory}"
    config = json_object(directory / "config.json")
    config |= config.get("text_config") or {}
    if not isinstance(config.get("vocab_size"), int):
        raise SPPOError(f"{name}: its config.json has no vocab_size, so it is no language model's")
    with loading(f"{name}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise SPPOError(
            f"{name}: its tokenizer has no chat template, so how it reads a conversation is not known; put the one it "
            "was trained with into the directory as chat_template.jinja"
        )
    return tokenizer, config


def fetch(recipe: Recipe) -> Path:
    """The directory of the tokenizer, once the server serves the model and has answered trial texts with rewards."""
    RewardServer(recipe)
    return _directory(recipe)


def identity(recipe: Recipe) -> dict[str, Any]:
    """The model's name, and the files that say how a text is read. Not the address, nor the weights behind it."""
    directory = _directory(recipe)
    files = {name: digest(directory / name) for name in ["config.json", *tokenizer_files(directory)]}
    more = {**date_identity(recipe.date, directory, {}), **system_identity(recipe)}
    return {"backend": "reward-server", "ranker": recipe.ranker, "reading": content_id(files), **more}


def load(recipe: Recipe) -> RewardServer:
    """The server, once it has answered trial texts."""
    return RewardServer(recipe)

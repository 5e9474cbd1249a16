"""A causal LM that is asked which of two responses is better: logit = logit("A") - logit("B") where it would answer.

Nothing is generated. Of the head only the rows of the two letters are kept, in float32, and it sees only the last place
of each text, so that there are no logits of a whole vocabulary. The question is pair_template.py's.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from sppo.command.errors import SPPOError
from sppo.command.importing import import_networks
from sppo.models import chat
from sppo.models.dates import fix_date
from sppo.models.files import model_identity, resolve
from sppo.models.frames import date_identity
from sppo.models.loading import disable_cudnn_attention
from sppo.rankers.batching import device_and_dtype
from sppo.rankers.pair_template import PRESETS, Question, question_text
from sppo.rankers.reading import Reading, context_of
from sppo.rankers.scoring import Networks, load_network, open_directory, padded, require_template, score
from sppo.rankers.templates import fill
from sppo.recipe import Recipe
from sppo.schema import Message, Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Key = tuple[str, str, str]  # (prompt as JSON, the response shown first, the one shown second)
_SLACK = 16  # tokens that texts may take more in one piece than one by one


class Letters(NamedTuple):
    """The token ids of "A" and of "B" where the model would answer."""

    a: int
    b: int


class Asker:
    """Pairs as a model's token ids, up to where it would answer. Raises SPPOError for a model that cannot be asked."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, context: int, recipe: Recipe) -> None:
        self.name, self.tokenizer, self.context = name, tokenizer, context
        self.question = Question(recipe.ranker_template, tokenizer)
        self.kwargs = recipe.chat_template_kwargs
        added = tokenizer.added_tokens_decoder.items()
        control = {token for token, its in added if its.special} | set(tokenizer.all_special_ids)
        self.control = {token for token in control if token != tokenizer.unk_token_id}

        plain = self.question.ask("prompt", "first", "second")
        self.lead: list[int] = []
        try:
            self.lead, self.letters = self._opening(plain)
            ids = self._ids(plain)
            self.turns, self.frame = self._control_of(ids), len(ids) - self._length(plain)
        except ValueError as error:
            raise SPPOError(f"{name}: {error}") from None
        self.length = lru_cache(maxsize=4096)(self._length)

    def _ids(self, asked: str, answer: str = "") -> list[int]:
        """The question in the chat template, up to the place of the letter; or answered already."""
        turns = [{"role": "user", "content": asked}]
        if answer:
            turns.append({"role": "assistant", "content": answer})
        ids = chat.conversation_ids(self.tokenizer, turns, not answer, self.kwargs)
        bare = self.question.name == "rlhflow" and ids[:1] == [self.tokenizer.bos_token_id]
        ids = ids[1:] if bare else ids
        return ids if answer else ids + self.lead

    def _opening(self, asked: str) -> tuple[list[int], Letters]:
        """(the white space that the template puts before an answer, the letters behind it).

        As the template's own answers begin. Where it has left something out of these, which it writes in a question to
        be answered, the letters are as the tokenizer goes on behind that. Raises SPPOError where a letter is not what
        an answer begins with: its logit would be noise.
        """
        ids = self._ids(asked)
        answered = [self._ids(asked, letter) for letter in "AB"]
        if any(found[: len(ids)] != ids for found in answered):
            text = self._text(asked)
            self._require_answerable(text.removeprefix(os.path.commonprefix([text, self._text(asked, "A")])))
            plain, *both = (
                list(self.tokenizer(text + end, add_special_tokens=False)["input_ids"]) for end in ("", *"AB")
            )
            answered = [ids + found[len(plain) :] if found[: len(plain)] == plain else ids for found in both]

        same = next((i for i, both in enumerate(zip(*answered, strict=False)) if len(set(both)) > 1), len(ids))
        lead, letters = answered[0][len(ids) : same], [found[same : same + 1] for found in answered]
        if before := str(self.tokenizer.decode(lead)).strip():
            raise self._not_at_once(before)
        if [str(self.tokenizer.decode(letter)).strip() for letter in letters] != ["A", "B"]:
            raise SPPOError(
                f'{self.name}: "A" and "B" are not one token each where it would answer, so a preference cannot be '
                "read there; take another model, or a judge on a server"
            )
        return lead, Letters(*itertools.chain(*letters))

    def _text(self, asked: str, answer: str = "") -> str:
        turns = [{"role": "user", "content": asked}]
        if answer:
            turns.append({"role": "assistant", "content": answer})
        return chat.render(self.tokenizer, turns, not answer, self.kwargs)

    def _require_answerable(self, opened: str) -> None:
        """Raise SPPOError for the start of an answer that is to be followed by something else than a letter.

        opened: what the template writes there, and leaves out of an answer: nothing, or thoughts that are over.
        """
        if opened.strip() and not re.search(r"[<\[]/[\w:]+[>\]]\s*$", opened):
            raise self._not_at_once(opened)

    def _not_at_once(self, before: str) -> SPPOError:
        return SPPOError(
            f"{self.name}: its chat template begins an answer with {before[-60:]!r}, not with A or B. One that thinks "
            """first may take --chat_template_kwargs '{"enable_thinking": false}'; else take a judge on a server"""
        )

    def _control_of(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token in self.control]

    def read(self, prompt: str, first: str, second: str) -> Reading:
        """A pair. `prompt`: its messages as JSON. The conversation is cut from the left, a response never.

        ids: None where a text would forge a turn all the same, where the responses alone do not fit, and where the
        template refuses them.
        """
        conversation = self.question.conversation(json.loads(prompt))

        def ids(start: int) -> list[int]:
            return self._ids(self.question.ask(conversation[start:], first, second))

        try:
            start = 0
            if len(ids(0)) > self.context:
                starts = range(len(conversation))
                start = bisect.bisect_left(starts, True, key=lambda at: len(ids(at)) <= self.context)
            found = ids(start)
        except ValueError:
            return Reading(None)
        is_lost = start > 0 and start == len(conversation)
        if is_lost or len(found) > self.context or self._control_of(found) != self.turns:
            return Reading(None)
        return Reading(found, prompt_cut=start > 0)

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def count_cut(self, prompt: list[Message], responses: Sequence[str]) -> int:
        """1 where a pair of the responses leaves the conversation too little room. No response is ever cut."""
        lengths = {text: self.length(self.question.harmless(text)) for text in responses}
        texts = sorted(lengths, key=lambda text: -lengths[text])
        whole = self.question.ask(self.question.conversation(prompt), "", "")
        shown = self.question.shown * lengths[texts[0]]  # at most
        if self.frame + self.length(whole) + shown + _SLACK <= self.context:
            return 0
        pairs = [(a, b) for a in texts for b in texts if a != b] or [(a, a) for a in texts]
        return int(any(self.read(json.dumps(prompt), a, b).prompt_cut for a, b in pairs))


class AnswerHead(nn.Module):
    """The rows of the two letters of a head, for the last place of each text. `ends`: these places, (B,)."""

    def __init__(self, head: nn.Linear, letters: Letters) -> None:
        super().__init__()
        self.weight = nn.Parameter(head.weight[list(letters)].float(), requires_grad=False)  # (2, H)
        self.bias = None if head.bias is None else nn.Parameter(head.bias[list(letters)].float(), requires_grad=False)
        self.ends = torch.zeros(0, dtype=torch.long)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, H) -> (B, 1, 2), float32."""
        last = hidden[torch.arange(len(hidden), device=hidden.device), self.ends]
        return F.linear(last.float(), self.weight, self.bias)[:, None]


class PairLM:
    """A loaded model, which is asked in batches of at most batch_tokens tokens.

    dtype: of the weights; what is not finite in half precision is asked again in float32.
    """

    batched = True

    def __init__(self, directory: Path, device: str, recipe: Recipe, dtype: torch.dtype = torch.float32) -> None:
        self.directory, self.device, self.batch_tokens = directory, device, recipe.batch_tokens
        disable_cudnn_attention()
        self.asker = _open_pair_lm(directory, recipe)
        self.networks = Networks(self._network, dtype)
        self.rows = self.networks.usual.get_input_embeddings().num_embeddings
        self.count_cut = self.asker.count_cut

    def _network(self, dtype: torch.dtype) -> Any:
        """The model with an AnswerHead. What it does behind its head, such as Gemma-2's cap, it still does."""
        from transformers import AutoModelForCausalLM

        network = load_network(self.directory, AutoModelForCausalLM, self.device, dtype)
        head = network.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise SPPOError(f"ranker {self.directory}: its head is a {type(head).__name__}, which is not read here")
        if max(self.asker.letters) >= len(head.weight):
            raise SPPOError(f"ranker {self.directory}: its head has {len(head.weight)} rows, too few for its tokenizer")
        network.set_output_embeddings(AnswerHead(head, self.asker.letters))
        return network

    def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        """(index, logit) of every pair, each read once, as it is answered; NaN where it cannot be read."""
        keys: list[Key] = [(json.dumps(prompt), first, second) for prompt, first, second in pairs]
        pairs_of: dict[Key, list[int]] = {}
        for index, key in enumerate(keys):
            pairs_of.setdefault(key, []).append(index)
        texts = {key: ids for key in pairs_of if (ids := self.asker.read(*key).ids)}
        readable, wanted = list(texts), list(texts.values())
        if wanted and (largest := max(map(max, wanted))) >= self.rows:
            raise SPPOError(
                f"ranker {self.directory}: its tokenizer gives token {largest}, its embedding has {self.rows} rows"
            )
        found = score(wanted, [len(ids) for ids in wanted], self.batch_tokens, self.networks, self._forward)
        yield from ((index, nan) for index, key in enumerate(keys) if key not in texts)
        yield from ((index, logit) for i, [logit] in found for index in pairs_of[readable[i]])

    @torch.inference_mode()
    def _forward(self, network: Any, texts: list[list[int]]) -> list[list[float]]:
        """(B, 1): each text's logit, in one batch."""
        ids, ends = padded(texts, self.device)
        network.get_output_embeddings().ends = ends
        said = network(input_ids=ids, use_cache=False).logits.float()  # (B, 1, 2)
        return (said[..., 0] - said[..., 1]).tolist()


def _open_pair_lm(directory: Path, recipe: Recipe) -> Asker:
    """A model that can be asked, without its weights. Raises SPPOError for a directory that holds none."""
    raw, config, tokenizer = open_directory(directory, "causal LM")
    made = ", ".join(map(str, raw.get("architectures") or []))
    if "ForSequenceClassification" in made:  # seen before its weights are loaded, which may be hours later
        raise SPPOError(f"ranker {directory} is a {made} and no causal LM; a reward model's backend is reward-model")
    require_template(directory, tokenizer)
    fix_date(tokenizer, recipe.date)
    return Asker(f"ranker {directory}", tokenizer, context_of(config.get_text_config(), tokenizer), recipe)


def fetch(recipe: Recipe) -> Path:
    """The model's directory, in the cache after this. Raises SPPOError where it cannot be asked."""
    directory = resolve(recipe.ranker, recipe.ranker_revision, "ranker")
    _open_pair_lm(directory, recipe)
    return directory


def identity(recipe: Recipe) -> dict[str, Any]:
    """Weights, config, tokenizer and chat template of the model, its question, and the chat template's arguments."""
    template = question_text(recipe.ranker_template)
    if recipe.ranker_template == "judge":
        template = fill(template, "prompt", "first", "second")
    directory = resolve(recipe.ranker, recipe.ranker_revision, "ranker")
    kind = recipe.ranker_template if recipe.ranker_template in PRESETS else "file"
    return {
        "backend": "pair-lm",
        "ranker": model_identity(directory),
        "template": hashlib.sha256(f"{kind}: {template}".encode()).hexdigest()[:16],
        "chat_template_kwargs": recipe.chat_template_kwargs,
        **date_identity(recipe.date, directory, recipe.chat_template_kwargs),
    }


def load(recipe: Recipe) -> PairLM:
    """The model, ready to answer, on the device and in the precision of device_and_dtype."""
    import_networks()
    device, dtype = device_and_dtype()
    return PairLM(resolve(recipe.ranker, recipe.ranker_revision, "ranker"), device, recipe, dtype)

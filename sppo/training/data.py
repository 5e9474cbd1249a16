"""The training set: rows of train.parquet, or of anybody's preference data, as token ids within their budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sppo.common import chat
from sppo.common.errors import SPPOError
from sppo.common.parquet import read_rows
from sppo.config import Recipe
from sppo.formats import is_conversation
from sppo.training.dataset import GENERATED, columns, open_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = np.ndarray  # (T,), int32: a list of Python integers takes nine times the memory


@dataclass
class TrainingSet(torch.utils.data.Dataset):
    """Token ids and win rates of N rows: two responses each, chosen first, or for `sppo_all` up to K.

    All responses of all rows are numbered through; `sequence_rates` (S,) has P(response > policy) of each.
    """

    prompts: list[tuple[Ids, ...]]  # the prompt as cut for each response
    responses: list[tuple[Ids, ...]]
    win_rates: torch.Tensor  # (N, 3), float32: p, p_win, p_lose of the chosen and the rejected response
    sequence_rates: torch.Tensor  # (S,), float32
    pair: list[tuple[int, int]]  # which of a row's responses are its chosen and its rejected one
    counts: dict[str, int]
    drawn_logps: np.ndarray  # (S,): the engine's log-prob of each whole response where it is known, else NaN

    def __post_init__(self) -> None:
        self.first = np.concatenate([[0], np.cumsum([len(r) for r in self.responses])])  # a row's first response

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, place: Place) -> Place:
        return place  # batch() puts the rows of its places together

    def sequences(self, row: int) -> torch.Tensor:
        """The numbers of a row's responses."""
        return torch.arange(self.first[row], self.first[row + 1])

    def lengths(self) -> np.ndarray:
        """(N,): tokens of each row's longest sequence, which decides how wide its batch is."""
        sides = zip(self.prompts, self.responses, strict=True)
        return np.array([max(len(p) + len(r) for p, r in zip(*row, strict=True)) for row in sides])

    def most_response_tokens(self) -> int:
        """Response tokens of the row that has most."""
        return max(sum(map(len, row)) for row in self.responses)

    def batch(self, places: list[Place], pad_id: int, parts: int = 1, part_tokens: int = 1) -> dict[str, Any]:
        """A batch of integers only: the rows' responses, one row after the other, padded on the right.

        input_ids, attention_mask: (S, T). positions: (P,), places in the flattened (S, T) whose next token is a
        response's. runs: up to `parts` groups of the S by length, of part_tokens tokens or more, which go through the
        network one after the other, each as wide as its longest (widths): a row's responses seldom have one length.
        sequence: (S,), number in the data set. row: (S,), which of the B rows. pair: (B, 2), which of the S are chosen
        and rejected. index: (B,). rows, step_rows: how many of the B count, and rows in the optimiser step. Win rates
        and reference log-probs are looked up by number: DeepSpeed in bfloat16 would round every float.
        """
        index = [place.index for place in places]
        sides = [side for i in index for side in zip(self.prompts[i], self.responses[i], strict=True)]
        lengths = np.array([len(prompt) + len(response) for prompt, response in sides])
        width = int(lengths.max())
        order = np.argsort(-lengths, kind="stable")
        count = min(parts, max(1, int(lengths.sum()) // part_tokens))
        runs = [order[list(run)] for run in even_parts(lengths[order], count) if len(run)]
        input_ids = torch.full((len(sides), width), pad_id)
        attention_mask = torch.zeros_like(input_ids)
        positions = []
        for n, (prompt, response) in enumerate(sides):
            length = lengths[n]
            input_ids[n, :length] = torch.from_numpy(np.concatenate([prompt, response]))
            attention_mask[n, :length] = 1
            positions.append(torch.arange(len(prompt) - 1, length - 1) + n * width)
        counts = [len(self.responses[i]) for i in index]
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "positions": torch.cat(positions),
            "runs": [torch.from_numpy(run) for run in runs],
            "widths": [int(lengths[run[0]]) for run in runs],
            "sequence": torch.cat([self.sequences(i) for i in index]),
            "row": torch.arange(len(index)).repeat_interleave(torch.tensor(counts)),
            "pair": torch.tensor(
                [(s + self.pair[i][0], s + self.pair[i][1]) for s, i in zip(starts, index, strict=True)]
            ),
            "index": torch.tensor(index),
            "rows": sum(place.counts for place in places),
            "step_rows": places[0].step_rows,
        }


class Place(NamedTuple):
    """A row's place in an epoch: whether its loss counts, and how many rows its optimiser step has."""

    index: int
    counts: bool = True
    step_rows: int = 1


class StepBatches(torch.utils.data.Sampler):
    """One rank's micro-batches of an epoch: each row once, in an order that seed and epoch decide.

    A step's rows are `global_batch` neighbours of a plain random permutation, whatever the number of ranks. Only which
    of the step's micro-batches a row sits in, and how many sit there, goes by length, and a step's gradient is a sum
    over its rows: grouping changes no step's gradient at all. (Not so for `kto_pair`, which couples the rows of a
    micro-batch: `group` is False there.) The ranks get neighbours in length at the same time, so that none waits long
    for another. The epoch's last step has the rows that are left; an empty micro-batch gets the shortest row, whose
    loss does not count.
    """

    def __init__(
        self, lengths: np.ndarray, batch: int, accumulate: int, seed: int, ranks: int, rank: int, group: bool
    ) -> None:
        self.lengths, self.batch, self.accumulate = lengths, batch, accumulate
        self.seed, self.ranks, self.rank, self.group = seed, ranks, rank, group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.accumulate * -(-len(self.lengths) // (self.batch * self.accumulate * self.ranks))

    def __iter__(self) -> Iterator[list[Place]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.lengths))
        micro = self.accumulate * self.ranks
        filler = [Place(int(self.lengths.argmin()), counts=False)]
        for start in range(0, len(order), self.batch * micro):
            rows = order[start : start + self.batch * micro]
            if self.group:
                rows = rows[np.argsort(-self.lengths[rows], kind="stable")]  # longest first: too long shows early
            parts = even_parts(self.lengths[rows], micro) if self.group else np.array_split(range(len(rows)), micro)
            for part in parts[self.rank :: self.ranks]:
                yield [Place(int(rows[i]), True, len(rows)) for i in part] or filler


def even_parts(lengths: np.ndarray, count: int) -> list[range]:
    """`count` runs of neighbours whose sizes, padding included, are as even as can be: rows times the first's length.

    lengths: (n,), longest first. A run of short rows has more of them, so that no micro-batch leaves a GPU waiting, and
    the largest is smaller than with as many rows in each. Runs are empty where there are more of them than rows.
    """
    n = len(lengths)

    def runs(size: int) -> list[range]:
        made, start = [], 0
        while start < n:
            stop = min(n, start + max(1, size // int(lengths[start])))
            made.append(range(start, stop))
            start = stop
        return made

    low, high = 1, int(lengths[0]) * -(-n // count)  # the latter is enough: that many rows in each
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(runs(middle)) <= count else (middle + 1, high)
    parts = runs(low)
    while len(parts) < min(count, n):  # fewer would do; nobody shall idle
        most = max(range(len(parts)), key=lambda i: len(parts[i]))
        whole = parts[most]
        parts[most : most + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return parts + [range(0)] * (count - len(parts))


class Batches(torch.utils.data.DataLoader):
    """Batches of StepBatches. It hands on the epoch, which the Trainer tells its loader."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


@dataclass
class _Reading:
    """How conversations become token ids, and what is counted on the way."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: set[int]
    template_kwargs: dict[str, Any]
    counts: Counter[str]

    def templated(self, prompt: list[dict[str, str]], answer: str) -> tuple[list[int], list[int]]:
        """(prompt ids, response ids) of one templating of the conversation."""
        messages = chat.with_system(self.tokenizer, prompt, "")
        return chat.response_ids(self.tokenizer, messages, answer, self.stop_ids, self.template_kwargs)


@dataclass
class _Row:
    """A row before its budgets: [(prompt ids, response ids)], their win rates, p, and which are the pair.

    drawn: the engine's log-probs of each response's tokens, where the row has its token ids and they are known.
    """

    sides: list[tuple[list[int], list[int]]]
    rates: list[float]
    p: float
    pair: tuple[int, int] = (0, 1)
    drawn: list[list[float] | None] | None = None


def load_training_set(
    path: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int], recipe: Recipe
) -> TrainingSet:
    """Rows of `path` as token ids.

    What was generated is what is trained on: where a row holds token ids of this very tokenizer, those are used, and
    otherwise one templating of the conversation. Only a prompt of more than max_prompt_length tokens is cut, on the
    left; each response, by itself, to max_length less its prompt. Cuts are counted. For `sppo_all` an empty response
    is left out and counted, and a row with no other is dropped and counted. Raises SPPOError for win rates outside
    [0, 1] and conversations that the template refuses.
    """
    identity = chat.tokenizer_identity(tokenizer)
    counts: Counter[str] = Counter()
    reading = _Reading(tokenizer, stop_ids, recipe.chat_template_kwargs, counts)
    made: list[_Row] = []
    prompts, responses, drawn_logps = [], [], []
    read = _all_responses if recipe.loss_type == "sppo_all" else _pair
    names = open_dataset(path, recipe).schema_arrow.names
    wanted = dict.fromkeys([*columns(recipe.loss_type), *(c for c in GENERATED if c in names)])
    for number, values in enumerate(read_rows(path, list(wanted))):
        known = values.get("tokenizer") == identity and values.get("prompt_token_ids")
        try:
            row = read(values, bool(known), reading)
        except ValueError as error:
            raise SPPOError(f"{path}, row {number}: {error}") from None
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise SPPOError(f"{path}, row {number}: it is not as compute_prob.py writes it ({said})") from None
        if not row.sides:
            counts["rows_without_a_response"] += 1
            continue
        kept_prompts, kept_responses = [], []
        for (prompt, response), drawn in zip(row.sides, row.drawn or [None] * len(row.sides), strict=True):
            if not response:
                raise SPPOError(
                    f"{path}, row {number}: a response without a token; run compute_prob.py, which drops those"
                )
            if len(prompt) > recipe.max_prompt_length:
                counts["prompts_cut"] += 1
                head = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []  # the policy never reads without it
                prompt = [*head, *prompt[len(prompt) - recipe.max_prompt_length + len(head) :]]
                drawn = None
            room = recipe.max_length - len(prompt)
            is_whole = drawn is not None and len(response) <= room and len(drawn) == len(response)
            drawn_logps.append(sum(drawn) if is_whole else np.nan)
            counts["responses_cut"] += len(response) > room
            counts["response_tokens_cut"] += max(0, len(response) - room)
            kept_prompts.append(np.array(prompt, np.int32))
            kept_responses.append(np.array(response[:room], np.int32))
        prompts.append(tuple(kept_prompts))
        responses.append(tuple(kept_responses))
        row.sides = []
        made.append(row)
    if not made:
        raise SPPOError(f"{path} has no rows to train on")
    counts["rows"] = len(made)
    return TrainingSet(
        prompts,
        responses,
        torch.tensor([[r.p, r.rates[r.pair[0]], r.rates[r.pair[1]]] for r in made], dtype=torch.float32),
        torch.tensor([rate for r in made for rate in r.rates], dtype=torch.float32),
        [r.pair for r in made],
        dict(counts),
        np.array(drawn_logps),
    )


def _pair(row: dict[str, Any], known: bool, reading: _Reading) -> _Row:
    """The chosen and the rejected response. Raises ValueError for what cannot be trained on."""
    rates = [row[c] for c in ("chosen_probs", "chosen_probs_win", "chosen_probs_lose")]
    _check(rates)
    if known:
        sides = [row["responses"][row[side]] for side in ("chosen_index", "rejected_index")]
        if all(side["token_ids"] for side in sides):
            reading.counts["rows_from_generated_ids"] += 1
            ids = [(row["prompt_token_ids"], side["token_ids"]) for side in sides]
            return _Row(ids, rates[1:], rates[0], drawn=[side.get("logps") for side in sides])
    reading.counts["rows_from_template"] += 1
    sides = []
    for side in ("chosen", "rejected"):
        conversation = row[side]
        if not is_conversation(conversation) or conversation[-1]["role"] != "assistant" or len(conversation) < 2:
            raise ValueError(f"{side} is not a conversation, each turn with its text, that ends with the assistant")
        sides.append(reading.templated(conversation[:-1], conversation[-1]["content"]))
    return _Row(sides, rates[1:], rates[0])


def _all_responses(row: dict[str, Any], known: bool, reading: _Reading) -> _Row:
    """All K responses with their win rates, the row means of `probability`. Raises ValueError as _pair does."""
    responses, probability = row["responses"] or [], row["probability"]
    k = len(responses)
    if len(probability or []) != k or any(len(line) != k for line in probability):
        raise ValueError(f"{k} responses, and a probability that is not {k} x {k}")
    rates = [sum(line) / k for line in probability]
    _check([value for line in probability for value in line])
    kept = [i for i, response in enumerate(responses) if (response["text"] or "").strip()]
    reading.counts["empty_responses_left_out"] += k - len(kept)
    if not kept:
        return _Row([], [], 0.5)
    drawn = None
    if known and all(responses[i].get("token_ids") for i in kept):
        drawn = [responses[i].get("logps") for i in kept]
        reading.counts["rows_from_generated_ids"] += 1
        sides = [(row["prompt_token_ids"], responses[i]["token_ids"]) for i in kept]
    else:
        reading.counts["rows_from_template"] += 1
        if not is_conversation(row["prompt"]):
            raise ValueError("prompt is not a list of messages, each with its text")
        sides = [reading.templated(row["prompt"], responses[i]["text"]) for i in kept]
    own = [rates[i] for i in kept]
    pair = int(np.argmax(own)), int(np.argmin(own))
    return _Row(sides, own, probability[kept[pair[0]]][kept[pair[1]]], pair, drawn)


def _check(rates: list[Any]) -> None:
    if not all(isinstance(r, float) and 0 <= r <= 1 for r in rates):
        raise ValueError(f"win rates {rates} are not {len(rates)} numbers between 0 and 1")

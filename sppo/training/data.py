"""The training set: rows of train.parquet, or of anybody's preference data, as token ids within their budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sppo.command.errors import SPPOError
from sppo.models import chat
from sppo.recipe import Recipe
from sppo.schema import BeyondTextError
from sppo.store.parquet import read_rows
from sppo.training.dataset import GENERATED, columns, is_as_written, open_dataset
from sppo.training.rows import Reading, Row

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


def load_training_set(
    path: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int], recipe: Recipe
) -> TrainingSet:
    """Rows of `path` as token ids.

    rows.py says which token ids a row becomes. Only a prompt of more than max_prompt_length tokens is cut, on the left;
    each response, by itself, to max_length less its prompt. Cuts are counted. A row with tool calls or the like is left
    out and counted; for `sppo_all` so is an empty response, and a row with no other. Raises SPPOError for win rates
    outside [0, 1], what is no text, and conversations that the template refuses.
    """
    counts: Counter[str] = Counter()
    identity = chat.tokenizer_identity(tokenizer)
    reading = Reading(tokenizer, identity, stop_ids, recipe.chat_template_kwargs, is_as_written(path), counts)
    made: list[Row] = []
    prompts, responses, drawn_logps = [], [], []
    names = open_dataset(path, recipe).schema_arrow.names
    wanted = dict.fromkeys([*columns(recipe.loss_type), *(c for c in GENERATED if c in names)])
    for number, values in enumerate(read_rows(path, list(wanted))):
        row = _read(reading, values, recipe.loss_type, f"{path}, row {number}")
        if row is None:
            continue
        sides = [
            _cut(prompt, response, drawn, recipe, tokenizer.bos_token_id, counts)
            for (prompt, response), drawn in zip(row.sides, row.drawn or [None] * len(row.sides), strict=True)
        ]
        prompts.append(tuple(side.prompt for side in sides))
        responses.append(tuple(side.response for side in sides))
        drawn_logps += [side.drawn_logp for side in sides]
        row.sides, row.drawn = [], None
        made.append(row)
    if not made:
        raise SPPOError(f"{path} has no rows to train on" + (f"; {dict(+counts)}" if +counts else ""))
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


def _read(reading: Reading, values: dict[str, Any], loss_type: str, where: str) -> Row | None:
    """The row; None for one that is left out, and counted. Raises SPPOError, which says `where` the row is."""
    try:
        row = reading.row(values, loss_type)
    except BeyondTextError as error:
        reading.counts[f"rows_left_out ({error})"] += 1
        return None
    except ValueError as error:
        raise SPPOError(f"{where}: {error}") from None
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise SPPOError(f"{where}: it is not as compute_prob.py writes it ({said})") from None
    if not row.sides:
        reading.counts["rows_without_a_response"] += 1
        return None
    if not all(response for _, response in row.sides):
        raise SPPOError(f"{where}: a response without a token; run compute_prob.py, which drops those")
    return row


class _Side(NamedTuple):
    """A prompt and a response within their budgets; the engine's log-prob of the whole response, else NaN."""

    prompt: Ids
    response: Ids
    drawn_logp: float


def _cut(
    prompt: list[int],
    response: list[int],
    drawn: list[float] | None,
    recipe: Recipe,
    bos_id: int | None,
    counts: Counter[str],
) -> _Side:
    """Cut what is too long, the prompt on the left and the response on the right, and count it."""
    if len(prompt) > recipe.max_prompt_length:
        counts["prompts_cut"] += 1
        head = prompt[:1] if prompt[0] == bos_id else []  # the policy never reads without it
        prompt = [*head, *prompt[len(prompt) - recipe.max_prompt_length + len(head) :]]
        drawn = None
    room = recipe.max_length - len(prompt)
    is_whole = drawn is not None and len(response) <= room and len(drawn) == len(response)
    counts["responses_cut"] += len(response) > room
    counts["response_tokens_cut"] += max(0, len(response) - room)
    logp = sum(drawn) if is_whole else np.nan
    return _Side(np.array(prompt, np.int32), np.array(response[:room], np.int32), logp)

"""The training set: rows of train.parquet, or of anybody's preference data, as token ids within their budgets.

`read_row` makes a row's token ids, `fit` cuts them to their budgets, a TrainingSet holds them all.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sppo.command.errors import SPPOError
from sppo.recipe import Recipe
from sppo.schema import BeyondTextError
from sppo.store.parquet import read_rows
from sppo.training.dataset import GENERATED, columns, is_as_written, open_dataset
from sppo.training.rows import Reading, Row, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = np.ndarray  # (T,), int32: a list of Python integers takes nine times the memory


class Example(NamedTuple):
    """A row within its budgets: two responses, chosen first, or for `sppo_all` up to K."""

    # what each response is given: the prompt as cut, and without train_thoughts its thought too
    prompts: tuple[Ids, ...]
    responses: tuple[Ids, ...]  # what is trained on: the rest
    win_rates: list[float]  # P(response > policy) of each
    p: float  # P(chosen > rejected)
    pair: tuple[int, int]  # which of the responses are the chosen and the rejected one
    drawn_logps: list[float]  # the engine's log-prob of what is trained on of each whole response; NaN: not known


class TrainingSet:
    """Token ids and win rates of N rows. All S responses of all rows are numbered through, row by row."""

    def __init__(self, examples: list[Example], counts: dict[str, int]) -> None:
        """counts: what was cut, left out and so on, for the manifest."""
        self.counts = counts
        self.prompts = [e.prompts for e in examples]
        self.responses = [e.responses for e in examples]
        self.pair = [e.pair for e in examples]
        self.drawn_logps = np.array([logp for e in examples for logp in e.drawn_logps])  # (S,)
        # (N + 1,): the number of each row's first response
        self.first = np.concatenate([[0], np.cumsum([len(e.responses) for e in examples])])

        # (N, 3), float32: p, p_win, p_lose, as in the losses; (S,), float32: P(response > policy)
        pair_rates = [[e.p, e.win_rates[e.pair[0]], e.win_rates[e.pair[1]]] for e in examples]
        self.win_rates = torch.tensor(pair_rates, dtype=torch.float32)
        self.sequence_rates = torch.tensor([rate for e in examples for rate in e.win_rates], dtype=torch.float32)

    def __len__(self) -> int:
        """N."""
        return len(self.prompts)

    def sequences(self, row: int) -> torch.Tensor:
        """(K,): the numbers of a row's responses."""
        return torch.arange(self.first[row], self.first[row + 1])

    def lengths(self) -> np.ndarray:
        """(N,): tokens of each row's longest sequence, prompt and response, which decides how wide its batch is."""
        longest = []
        for prompts, responses in zip(self.prompts, self.responses, strict=True):
            longest.append(max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)))
        return np.array(longest)

    def most_response_tokens(self) -> int:
        """Response tokens of the row that has most, of all its responses together."""
        return max(sum(len(response) for response in row) for row in self.responses)


def load_training_set(
    path: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int], recipe: Recipe
) -> TrainingSet:
    """Rows of `path` as token ids.

    rows.py says which token ids a row becomes, and `fit` what is cut. A row with tool calls or the like is left out and
    counted; for `sppo_all` so is an empty response, and a row with no other. Raises SPPOError for win rates outside
    [0, 1], what is no text, and conversations that the template refuses.
    """
    reading = Reading(recipe, tokenizer, stop_ids, is_as_written(path))
    there = open_dataset(path, recipe).schema_arrow.names
    needed = columns(recipe.loss_type)
    more = [name for name in GENERATED if name in there and name not in needed]

    examples = []
    for number, values in enumerate(read_rows(path, needed + more)):
        row = read_row(reading, values, f"{path}, row {number}")
        if row is not None:
            examples.append(fit(row, reading))
    counts = reading.counts
    if not examples:
        raise SPPOError(f"{path} has no rows to train on" + (f"; {dict(+counts)}" if +counts else ""))
    counts["rows"] = len(examples)
    return TrainingSet(examples, dict(counts))


def read_row(reading: Reading, values: dict[str, Any], where: str) -> Row | None:
    """The row; None for one that is left out, and counted. Raises SPPOError, which says `where` the row is."""
    try:
        row = reading.row(values)
    except BeyondTextError as error:
        reading.counts[f"rows_left_out ({error})"] += 1
        return None
    except ValueError as error:
        raise SPPOError(f"{where}: {error}") from None
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise SPPOError(f"{where}: it is not as compute_prob.py writes it ({said})") from None
    if not row.responses:
        reading.counts["rows_without_a_response"] += 1
        return None
    if not all(tokens.response for tokens in row.responses):
        raise SPPOError(f"{where}: a response without a token; run compute_prob.py, which drops those")
    return row


def fit(row: Row, reading: Reading) -> Example:
    """The row with what is too long cut, and counted.

    Only a prompt of more than max_prompt_length tokens is cut, on the left. Each response, by itself, is cut on the
    right to what its prompt leaves of max_length. A thought is no part of the prompt in this, so it is never cut on the
    left; what follows the cut is trained on, or without train_thoughts the answer behind the thought alone.
    """
    counts, trains_thoughts = reading.counts, reading.recipe.train_thoughts
    prompts, responses, drawn_logps = [], [], []
    for tokens in row.responses:
        prompt = _fit_prompt(tokens.prompt, reading)
        room = reading.recipe.max_length - len(prompt)
        counts["responses_cut"] += len(tokens.response) > room
        counts["response_tokens_cut"] += max(0, len(tokens.response) - room)
        counts["responses_cut_before_the_answer"] += room <= tokens.thought < len(tokens.response)
        given = 0 if trains_thoughts else tokens.thought
        prompts.append(np.array([*prompt, *tokens.response[:given]], np.int32))
        responses.append(np.array(tokens.response[given:room], np.int32))

        # the engine's log-prob is of the whole response after the whole prompt
        is_whole = len(prompt) == len(tokens.prompt) and len(tokens.response) <= room
        drawn_logps.append(_drawn_logp(tokens, given) if is_whole else np.nan)
    return Example(tuple(prompts), tuple(responses), row.win_rates, row.p, row.pair, drawn_logps)


def _fit_prompt(prompt: list[int], reading: Reading) -> list[int]:
    """The prompt's last tokens, behind its BOS where it has one: no policy reads without it."""
    most = reading.recipe.max_prompt_length
    if len(prompt) <= most:
        return prompt
    reading.counts["prompts_cut"] += 1
    head = prompt[:1] if prompt[0] == reading.tokenizer.bos_token_id else []
    return head + prompt[len(prompt) - most + len(head) :]


def _drawn_logp(tokens: Tokens, given: int) -> float:
    """The engine's log-prob of the response behind its first `given` tokens; NaN where it is not known of each."""
    if tokens.logps is None or len(tokens.logps) != len(tokens.response):
        return np.nan
    return sum(tokens.logps[given:])

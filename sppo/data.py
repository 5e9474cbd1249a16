"""The training set: rows of train.parquet, or of anybody's preference data, as token ids within their budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sppo import chat
from sppo.config import Recipe
from sppo.errors import SPPOError
from sppo.files import open_parquet, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUIRED = ["chosen", "rejected", "chosen_probs", "chosen_probs_win", "chosen_probs_lose"]
OURS = ["prompt", "responses", "chosen_index", "rejected_index", "prompt_token_ids", "tokenizer"]


@dataclass
class TrainingSet(torch.utils.data.Dataset):
    """Token ids and win rates of every row. `win_rates`: (N, 3), columns p, p_win, p_lose, float32."""

    prompts: list[tuple[list[int], list[int]]]  # the prompt as cut for the chosen and for the rejected response
    responses: list[tuple[list[int], list[int]]]  # chosen, rejected
    win_rates: torch.Tensor
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sides = zip(self.prompts[index], self.responses[index], strict=True)
        return {"index": index, "sides": [(prompt, response) for prompt, response in sides]}


def dataset_file(dataset: str, recipe: Recipe) -> Path:
    """The Parquet file to train on: a file, a $DATA directory's train.parquet, or a Hub data set's train split."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        path = path / "train.parquet"
    if path.suffix == ".parquet" or dataset.startswith((".", "/", "~")):
        open_parquet(path, REQUIRED)
        return path
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        loaded = datasets.load_dataset(dataset, split="train", revision=recipe.prompts_revision or None)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise SPPOError(f"--dataset {dataset}: no such directory, and the Hub does not give it: {first}") from None
    exported = Path(loaded.cache_files[0]["filename"]).with_suffix(".sppo.parquet")
    if not exported.exists():
        loaded.to_parquet(str(exported))
    open_parquet(exported, REQUIRED)
    return exported


def load_training_set(
    path: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int], recipe: Recipe
) -> TrainingSet:
    """Rows of `path` as token ids.

    What was generated is what is trained on: where a row holds token ids of this very tokenizer, those are used, and
    otherwise one templating of the conversation. Only a prompt of more than max_prompt_length tokens is cut, on the
    left; each response, by itself, to max_length less its prompt. Cuts are counted. Raises SPPOError for
    win rates outside [0, 1] and conversations that the template refuses.
    """
    identity = chat.tokenizer_identity(tokenizer)
    counts: Counter[str] = Counter()
    prompts, responses, win_rates = [], [], []
    for number, row in enumerate(_rows(path)):
        rates = [row[c] for c in ("chosen_probs", "chosen_probs_win", "chosen_probs_lose")]
        if not all(isinstance(r, float) and 0 <= r <= 1 for r in rates):
            raise SPPOError(f"{path}, row {number}: win rates {rates} are not three numbers between 0 and 1")
        try:
            sides = _token_ids(row, tokenizer, identity, stop_ids, counts, recipe.chat_template_kwargs)
        except ValueError as error:
            raise SPPOError(f"{path}, row {number}: {error}") from None
        kept_prompts, kept_responses = [], []
        for prompt, response in sides:
            if not response:
                raise SPPOError(
                    f"{path}, row {number}: a response without a token; run compute_prob.py, which drops those"
                )
            if len(prompt) > recipe.max_prompt_length:
                counts["prompts_cut"] += 1
                prompt = prompt[-recipe.max_prompt_length :]
            room = recipe.max_length - len(prompt)
            counts["responses_cut"] += len(response) > room
            counts["response_tokens_cut"] += max(0, len(response) - room)
            kept_prompts.append(prompt)
            kept_responses.append(response[:room])
        prompts.append(tuple(kept_prompts))
        responses.append(tuple(kept_responses))
        win_rates.append(rates)
    if not prompts:
        raise SPPOError(f"{path} has no rows to train on")
    counts["rows"] = len(prompts)
    return TrainingSet(prompts, responses, torch.tensor(win_rates, dtype=torch.float32), dict(counts))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    names = open_parquet(path, REQUIRED).schema_arrow.names
    return read_rows(path, REQUIRED + [c for c in OURS if c in names])


def _token_ids(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    identity: str,
    stop_ids: set[int],
    counts: Counter[str],
    template_kwargs: dict[str, Any],
) -> list[tuple[list[int], list[int]]]:
    """[(prompt ids, response ids)] of the chosen and the rejected response."""
    if row.get("tokenizer") == identity and row.get("prompt_token_ids"):
        drawn = [row["responses"][row[side]]["token_ids"] for side in ("chosen_index", "rejected_index")]
        if all(drawn):
            counts["rows_from_generated_ids"] += 1
            return [(row["prompt_token_ids"], ids) for ids in drawn]
    counts["rows_from_template"] += 1
    sides = []
    for side in ("chosen", "rejected"):
        conversation = row[side]
        if not conversation or conversation[-1]["role"] != "assistant" or len(conversation) < 2:
            raise ValueError(f"{side} is not a conversation that ends with the assistant")
        messages = chat.with_system(tokenizer, conversation[:-1], "")
        sides.append(chat.response_ids(tokenizer, messages, conversation[-1]["content"], stop_ids, template_kwargs))
    return sides


def collate(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of integers only: chosen rows first, rejected rows behind them, padded on the right.

    input_ids, attention_mask, response_mask: (2B, T); index: (B,). Win rates and reference log-probs are looked up
    by index: DeepSpeed in bfloat16 would round every float of a batch.
    """
    sides = [row["sides"][side] for side in (0, 1) for row in rows]
    width = max(len(prompt) + len(response) for prompt, response in sides)

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([v + [fill] * (width - len(v)) for v in values])

    return {
        "input_ids": padded([p + r for p, r in sides], pad_id),
        "attention_mask": padded([[1] * (len(p) + len(r)) for p, r in sides], 0),
        "response_mask": padded([[0] * len(p) + [1] * len(r) for p, r in sides], 0),
        "index": torch.tensor([row["index"] for row in rows]),
    }

"""pair-lm and gpm against plain loops over transformers: a part of benchmarks/ranking.py (--decoders).

The loops are what one writes first: a forward for each pair or for each 8 of them, padded on the left in the order that
they come, with logits of the whole vocabulary; for a GPM a forward for each of a pair's two responses.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import worlds
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from worlds import DEVICE

from sppo.rankers.gpm import GPM
from sppo.rankers.judge import judge_prompt
from sppo.rankers.pair_lm import PairLM
from sppo.ranking.shards import prompt_logits
from sppo.recipe import Recipe

Item = tuple[list[dict[str, str]], list[str]]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def make_items(prompts: int, pairs: int) -> list[Item]:
    """Prompts of 10 to 60 words, and responses of 5 to 120, most of them short."""
    rng = random.Random(0)
    asked = [[{"role": "user", "content": worlds.text(rng, 10, 20, 60)}] for _ in range(prompts)]
    return [(prompt, [worlds.text(rng, 5, 30, 120) for _ in range(pairs)]) for prompt in asked]


def pairs_of(items: list[Item]) -> list[tuple[Any, str, str]]:
    """Every ordered pair."""
    return [(prompt, a, b) for prompt, responses in items for a, b in permutations(responses, 2)]


@torch.inference_mode()
def plain_pairs(model: Any, tokenizer: Any, items: list[Item], batch: int) -> list[float]:
    """logit("A") - logit("B") of every pair, `batch` at once."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": judge_prompt(*pair)}], tokenize=False, add_generation_prompt=True
        )
        for pair in pairs_of(items)
    ]
    a, b = tokenizer.convert_tokens_to_ids(["A", "B"])
    found: list[float] = []
    for i in range(0, len(texts), batch):
        given = tokenizer(texts[i : i + batch], add_special_tokens=False, padding=True, return_tensors="pt").to(DEVICE)
        logits = model(**given).logits[:, -1]
        found += (logits[:, a] - logits[:, b]).tolist()
    return found


@torch.inference_mode()
def plain_points(model: Any, tokenizer: Any, items: list[Item]) -> list[float]:
    """A forward for each response of each pair, and the area between the two hidden states' first two numbers."""
    found = []
    for prompt, *texts in pairs_of(items):
        points = []
        for text in texts:
            turns = [*prompt, {"role": "assistant", "content": text}]
            given = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt").to(DEVICE)
            points.append(model(**given).last_hidden_state[0, -1, :2].float())
        found.append(float(points[0][0] * points[1][1] - points[0][1] * points[1][0]))
    return found


def compare(scratch: Path, size: str, prompts: int, rounds: int, batch_tokens: int) -> None:
    """Print pairs a second of each way, medians over the rounds, for K = 5 and 16."""
    source = worlds.llama(scratch / "lm", size, ("A", "B"))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPE).to(DEVICE).eval()
    backbone = AutoModel.from_pretrained(source, dtype=DTYPE).to(DEVICE).eval()
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    asked = PairLM(source, DEVICE, Recipe(batch_tokens=batch_tokens), DTYPE)
    points = GPM(worlds.gpm(source, scratch / "gpm"), DEVICE, batch_tokens, DTYPE)

    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{size}: {prompts} prompts, {rounds} rounds, {where}; pairs a second")
    for k in (5, 16):
        items = make_items(prompts, k)
        logits = np.array([logit for _, logit in sorted(asked.logits(pairs_of(items[:1])))])
        gap = np.abs(logits - plain_pairs(model, tokenizer, items[:1], 1)).max() if k == 5 else 0.0
        assert gap < 1e-3 or DEVICE == "cuda", gap  # else something else is measured
        ways: dict[str, Callable[[], Any]] = {
            "pair-lm": lambda items=items: dict(prompt_logits(asked, items)),
            "gpm": lambda items=items: dict(prompt_logits(points, items)),
        }
        if k == 5:  # each pair costs a plain loop the same
            ways |= {
                "pairs, one at a time": lambda items=items: plain_pairs(model, tokenizer, items, 1),
                "pairs, 8 at once": lambda items=items: plain_pairs(model, tokenizer, items, 8),
                "gpm, two forwards a pair": lambda items=items: plain_points(backbone, tokenizer, items),
            }
        count = len(pairs_of(items))
        for name, way in ways.items():
            seconds = []
            for _ in range(rounds + (DEVICE == "cuda")):  # a round that is not timed: kernels are loaded
                started = time.perf_counter()
                way()
                seconds.append(time.perf_counter() - started)
                if seconds[0] > 30 and DEVICE == "cpu":
                    break  # so long a round differs little from the next
            median = statistics.median(seconds[-rounds:])
            spread = f"({min(seconds):.2f} to {max(seconds):.2f} s)"
            print(f"  K = {k:2d}  {name:26s} {count / median:9.2f}  {spread}", flush=True)

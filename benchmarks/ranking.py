"""Ranking: our PairRM against llm-blender's Blender.rank, the same weights and texts, pairs per second.

    python benchmarks/ranking.py                    a tiny PairRM
    python benchmarks/ranking.py --short_texts      the same with texts of a line, where launching work is what costs
    python benchmarks/ranking.py --size large       DeBERTa-v3-large's shape, random weights; a handful of pairs
    python benchmarks/ranking.py --size large --prompts 64 --pairs 5      on a GPU
    python benchmarks/ranking.py --decoders 0.1b    pair-lm and gpm against plain loops over transformers, K = 5 and 16

Reads   nothing: makes models with random weights, and texts of mixed length.
Writes  nothing; prints medians over the rounds, ratios, and the share of this machine's matrix rate.
Exit codes: 0 done, 1 failed.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import decoders  # noqa: E402
import worlds  # noqa: E402
from worlds import DEVICE  # noqa: E402

from sppo.launch.devices import matrix_rate  # noqa: E402
from sppo.method.preference import mean_scores  # noqa: E402
from sppo.rankers._pairrm_network import PairRM  # noqa: E402
from sppo.rankers.llm_blender import load_blender  # noqa: E402
from sppo.ranking.shards import prompt_logits  # noqa: E402

Item = tuple[str, list[str]]


def make_items(prompts: int, pairs: int, short: bool) -> list[Item]:
    """Prompts of 20 to 800 words and responses of 10 to 500, most of them short, as in UltraFeedback, or a tenth."""
    rng = random.Random(0)
    part = 10 if short else 1

    def text(low: int, mean: int, high: int) -> str:
        return worlds.text(rng, max(1, low // part), mean // part, high // part)

    return [(text(20, 100, 800), [text(10, 150, 500) for _ in range(pairs)]) for _ in range(prompts)]


def useful_flops(ranker: PairRM, items: list[Item], size: str) -> float:
    """Multiply-adds x 2 that the comparisons need, without padding and the positions' own projections."""
    hidden, layers, _, inner, _ = worlds.DEBERTAS[size]
    total = 0.0
    for text, responses in items:
        prompt = [{"role": "user", "content": text}]
        for a in range(len(responses)):
            for b in range(len(responses)):
                if a != b:
                    n = len(ranker.inputs.encode(prompt, responses[a], responses[b])[0])
                    linear = 2 * n * (4 * hidden**2 + 2 * hidden * inner)
                    attention = 4 * n * n * hidden + 4 * n * min(512, 2 * n) * hidden
                    total += layers * (linear + attention)
    return total


def pairs_of(items: list[Item]) -> int:
    """Comparisons: K(K - 1) of each prompt."""
    return sum(len(responses) * (len(responses) - 1) for _, responses in items)


def load_ours(directory: Path, batch_tokens: int) -> PairRM:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    return PairRM(directory, DEVICE, batch_tokens, dtype)


def rank_ours(ranker: PairRM, items: list[Item]) -> np.ndarray:
    """(N, K): mean scores, as rank.py makes them."""
    asked = [([{"role": "user", "content": text}], responses) for text, responses in items]
    found = dict(prompt_logits(ranker, asked))
    return mean_scores(np.array([found[i] for i in range(len(items))]))


def rank_theirs(blender: Any, items: list[Item], batch_size: int) -> np.ndarray:
    """(N, K): llm-blender's scores."""
    prompts, candidates = [text for text, _ in items], [responses for _, responses in items]
    return blender.rank(prompts, candidates, return_scores=True, batch_size=batch_size, disable_tqdm=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=worlds.DEBERTAS, default="tiny")
    parser.add_argument("--decoders", choices=worlds.LLAMAS, help="pair-lm and gpm of this shape, and no PairRM")
    parser.add_argument("--prompts", type=int, help="default: 12 for tiny, 2 for large")
    parser.add_argument("--pairs", type=int, help="K; default: 5 for tiny, 2 for large")
    parser.add_argument("--short_texts", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_tokens", type=int, default=16384)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4], help="llm-blender's, to find its best")
    args = parser.parse_args()
    if args.decoders:
        with tempfile.TemporaryDirectory() as scratch:
            decoders.compare(Path(scratch), args.decoders, args.prompts or 2, args.rounds, args.batch_tokens)
        return
    tiny = args.size == "tiny"
    items = make_items(args.prompts or (12 if tiny else 2), args.pairs or (5 if tiny else 2), args.short_texts)
    with tempfile.TemporaryDirectory() as scratch:
        compare(worlds.pairrm(Path(scratch), args.size), items, args)


def compare(directory: Path, items: list[Item], args: argparse.Namespace) -> None:
    """Rank `items` in every way, in turns, and print what each took."""
    ours = load_ours(directory, args.batch_tokens)
    theirs = load_blender(directory, DEVICE)
    ways = {"ours": lambda: rank_ours(ours, items)}
    for size in args.batch_sizes:
        if size <= len(items):
            ways[f"llm-blender, batch_size={size}"] = functools.partial(rank_theirs, theirs, items, size)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, np.ndarray] = {}
    warm_ups = 1 if DEVICE == "cuda" else 0  # rounds that are not timed: kernels are loaded and compiled
    for number in range(warm_ups + args.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            scores[name] = way()
            if number >= warm_ups:
                seconds[name].append(time.perf_counter() - started)
    pairs, rate, flops = pairs_of(items), matrix_rate(), useful_flops(ours, items, args.size)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.size}: {len(items)} prompts, {pairs} pairs, {args.rounds} rounds, {where}")
    ours_median = statistics.median(seconds["ours"])
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"{min(values):.2f} to {max(values):.2f} s"
        share = 100 * flops / median / rate
        gap = abs(scores[name] - scores["ours"]).max()
        print(
            f"  {name:28s} {pairs / median:8.2f} pairs/s ({spread}), {share:4.1f}% of the matrix rate, "
            f"ours is {median / ours_median:.2f} times as fast, scores differ by {gap:.1e}"
        )
    print(f"  the matrix rate here: {rate / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()

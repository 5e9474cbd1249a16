"""Ranking: our PairRM against llm-blender's Blender.rank, the same weights and texts, pairs per second.

    python benchmarks/ranking.py                    a tiny PairRM
    python benchmarks/ranking.py --short_texts      the same with texts of a line, where launching work is what costs
    python benchmarks/ranking.py --size large       DeBERTa-v3-large's shape, random weights; a handful of pairs
    python benchmarks/ranking.py --size large --prompts 64 --pairs 5 --fused_attention       on a GPU

Reads   nothing: makes a PairRM with random weights, and texts of mixed length.
Writes  nothing; prints medians over the rounds, ratios, and the share of this machine's matrix rate.
Exit codes: 0 done, 1 failed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sppo.common.preference import mean_scores  # noqa: E402
from sppo.demo import ranker_tokenizer  # noqa: E402
from sppo.rankers._pairrm_network import PairRM, PairRMModel  # noqa: E402
from sppo.rankers.llm_blender import load_blender  # noqa: E402
from sppo.ranking.shards import prompt_logits  # noqa: E402

WORDS = "the of and to in is that for it as was with be by on not he his but at are this have from or had an".split()
# hidden size, layers, heads, inner size; `large` is microsoft/deberta-v3-large's
SIZES = {"tiny": (64, 3, 2, 128), "large": (1024, 24, 16, 4096)}
Item = tuple[str, list[str]]


def make_ranker(directory: Path, size: str) -> Path:
    """A PairRM of that shape with random weights, in the published layout."""
    from transformers import DebertaV2Config

    hidden, layers, heads, inner = SIZES[size]
    tokenizer = ranker_tokenizer([" ".join(WORDS)] * 4)
    base = directory / "base"
    config = DebertaV2Config(
        vocab_size=len(tokenizer) + 4,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=-1,
        position_biased_input=False,
        type_vocab_size=0,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    model = PairRMModel(config, 1, 0.0)
    (directory / "PairRM").mkdir()
    save_file(model.state_dict(), directory / "PairRM" / "model.safetensors", metadata={"format": "pt"})
    settings = {"ranker_type": "pairranker", "model_type": "deberta", "model_name": "../base", "n_tasks": 1}
    settings |= {"source_maxlength": 1224, "candidate_maxlength": 412, "fp16": torch.cuda.is_available()}
    settings |= {"reduce_type": "linear", "inference_mode": "full", "loss_type": "instructgpt", "drop_out": 0.05}
    (directory / "PairRM" / "config.json").write_text(json.dumps(settings))
    return directory / "PairRM"


def make_items(prompts: int, pairs: int, short: bool) -> list[Item]:
    """Prompts of 20 to 800 words and responses of 10 to 500, most of them short, as in UltraFeedback, or a tenth."""
    rng = random.Random(0)
    part = 10 if short else 1

    def text(low: int, mean: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=max(1, min(high, int(low + rng.expovariate(1 / mean))) // part)))

    return [(text(20, 100, 800), [text(10, 150, 500) for _ in range(pairs)]) for _ in range(prompts)]


def useful_flops(ranker: PairRM, items: list[Item], size: str) -> float:
    """Multiply-adds x 2 that the comparisons need, without padding and the positions' own projections."""
    hidden, layers, _, inner = SIZES[size]
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


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product here: the best of a few."""
    n = 8192 if device == "cuda" else 1536
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--prompts", type=int, help="default: 12 for tiny, 2 for large")
    parser.add_argument("--pairs", type=int, help="K; default: 5 for tiny, 2 for large")
    parser.add_argument("--short_texts", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_tokens", type=int, default=16384)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4], help="llm-blender's, to find its best")
    parser.add_argument("--fused_attention", action="store_true")
    args = parser.parse_args()
    tiny = args.size == "tiny"
    items = make_items(args.prompts or (12 if tiny else 2), args.pairs or (5 if tiny else 2), args.short_texts)
    with tempfile.TemporaryDirectory() as scratch:
        compare(make_ranker(Path(scratch), args.size), items, args)


def compare(directory: Path, items: list[Item], args: argparse.Namespace) -> None:
    """Rank `items` in every way, in turns, and print what each took."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ours = PairRM(directory, device, args.batch_tokens, dtype, fused_backend="triton" if args.fused_attention else "")
    theirs = load_blender(directory, device)
    prompts, candidates = [text for text, _ in items], [responses for _, responses in items]

    def rank_ours() -> np.ndarray:
        asked = [([{"role": "user", "content": text}], responses) for text, responses in items]
        found = dict(prompt_logits(ours, asked))
        return mean_scores(np.array([found[i] for i in range(len(items))]))

    def rank_theirs(batch_size: int) -> Callable[[], np.ndarray]:
        return lambda: theirs.rank(prompts, candidates, return_scores=True, batch_size=batch_size, disable_tqdm=True)

    ways = {"ours": rank_ours}
    ways |= {f"llm-blender, batch_size={b}": rank_theirs(b) for b in args.batch_sizes if b <= len(items)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, np.ndarray] = {}
    for warm in [True] * (device == "cuda") + [False] * args.rounds:
        for name, way in ways.items():
            started = time.perf_counter()
            scores[name] = way()
            synchronize(device)
            if not warm:
                seconds[name].append(time.perf_counter() - started)
    pairs = sum(len(responses) * (len(responses) - 1) for _, responses in items)
    rate, flops = matrix_rate(device, dtype), useful_flops(ours, items, args.size)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.size}: {len(items)} prompts, {pairs} pairs, {args.rounds} rounds, {where}, {dtype}")
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

"""Generation: our script's drawing against vLLM's own LLM.generate, and against K passes as the released script made.

    python benchmarks/generation.py                    throughput, the same engine and prompts for all (vLLM)
    python benchmarks/generation.py --model runs/SmolLM2-135M-Instruct --prompts 48 --pairs 8 --maxlen 80 --rounds 3
    python benchmarks/generation.py --memory           peak memory at 1,000, 10,000, 100,000 prompts, engine left out

Reads   nothing: makes a small Mistral with random weights and prompts of mixed length. With --model: it, and the
        prompts of scripts/make_instructions.py.
Writes  nothing; prints medians over the rounds and their ratios.
Exit codes: 0 done, 1 failed.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.demo import chat_tokenizer  # noqa: E402
from examples.smollm2.instructions import make_instructions  # noqa: E402
from sppo.command.progress import progress  # noqa: E402
from sppo.generation import shards  # noqa: E402
from sppo.generation.engines import Request, Response, vllm  # noqa: E402
from sppo.generation.prompts import load_prompts  # noqa: E402
from sppo.generation.shards import generate_shards  # noqa: E402
from sppo.generation.templating import to_requests  # noqa: E402
from sppo.launch.devices import matrix_rate  # noqa: E402
from sppo.models import chat  # noqa: E402
from sppo.models.files import parameters, weight_shapes  # noqa: E402
from sppo.models.policy import open_policy  # noqa: E402
from sppo.recipe import Recipe  # noqa: E402
from sppo.store.journal import Journal  # noqa: E402
from sppo.store.shards import Slice  # noqa: E402

WORDS = "the of and to in is that for it as was with be by on not he his but at are this have from or had an".split()


def make_model(directory: Path, width: int) -> Path:
    """A Mistral with random weights whose answers end at random, so that lengths are mixed."""
    import torch
    from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

    tokenizer = chat_tokenizer([" ".join(WORDS)] * 4)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
        sliding_window=None,
    )
    model = MistralForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(directory)
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(directory)
    return directory


def make_prompts(path: Path, count: int) -> Path:
    """Prompts of 20 to 800 words, most of them short, as in UltraFeedback."""
    rng = random.Random(0)
    with open(path, "w") as handle:
        for i in range(count):
            length = min(800, int(20 + rng.expovariate(1 / 120)))
            handle.write(json.dumps({"prompt": f"{i} " + " ".join(rng.choices(WORDS, k=length))}) + "\n")
    return path


# what is timed: ours with and without a seed for each prompt, vLLM's own call likewise, and the released script's way
WAYS = ["generate.py", "generate.py --prompt_seeds false", "LLM.generate, one call, n=K, seeded",
        "LLM.generate, one call, n=K", "K passes, n=1, seeded"]  # fmt: skip


def timings(model: Path, asked: Path, pairs: int, maxlen: int, ways: list[str], rounds: int) -> Iterator[Any]:
    """(way, tokens a second) of every way in every round: one engine, the same requests. The first is a warm-up."""
    from vllm import SamplingParams, TokensPrompt

    recipe = Recipe(model=str(model), prompts=str(asked), pairs=pairs, maxlen=maxlen, temperature=1.0, top_p=1.0)
    policy = open_policy(str(model))
    tokenizer = policy.tokenizer()
    stops = policy.stop_ids(tokenizer)
    requests = to_requests(recipe, policy, tokenizer, load_prompts(recipe.prompts, recipe)).requests
    llm = vllm.start(policy, recipe, max(len(r.token_ids) + r.max_new_tokens for r in requests))
    inputs = [TokensPrompt(prompt_token_ids=list(r.token_ids)) for r in requests]

    def sampling(n: int, seed: int | None) -> SamplingParams:
        return SamplingParams(
            n=n, temperature=1.0, top_p=1.0, max_tokens=maxlen, seed=seed, stop_token_ids=sorted(stops)
        )

    def ours(seeds: bool) -> int:
        """What generate.py does between the engine's start and the shard: journal, decoding, bookkeeping."""
        recipe.prompt_seeds = seeds
        with tempfile.TemporaryDirectory() as scratch:
            journal = Journal(Path(scratch) / "journal", {})
            with progress(len(requests), "ours", "prompt") as bar:
                for request, responses in vllm.draw_from(llm, policy, recipe, stops, requests):
                    journal.add(request.prompt_id, shards._kept(request, responses, tokenizer))
                    bar.update()
            answers = [journal.read(r.prompt_id)["responses"] for r in requests]
            journal.remove()
        return sum(len(a["token_ids"]) for answer in answers for a in answer)

    def theirs(params: Any) -> int:
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return sum(len(o.token_ids) for output in outputs for o in output.outputs)

    def k_passes() -> int:
        total = 0
        for k in range(pairs):  # the released script: a pass for each k, one seed for all prompts of a pass
            total += theirs(sampling(1, k))
            llm.reset_prefix_cache()  # each of its passes was a new process
        return total

    calls: list[Callable[[], int]] = [
        lambda: ours(True),
        lambda: ours(False),
        lambda: theirs([sampling(pairs, r.seed) for r in requests]),
        lambda: theirs(sampling(pairs, None)),
        k_passes,
    ]
    named = dict(zip(WAYS, calls, strict=True))
    named[ways[0]]()
    for way in ways * rounds:
        llm.reset_prefix_cache()
        start = time.perf_counter()
        tokens = named[way]()
        yield way, tokens / (time.perf_counter() - start)


def throughput(args: argparse.Namespace) -> None:
    """Tokens per second of each way, and their ratios."""
    with tempfile.TemporaryDirectory() as scratch:
        scratched = Path(scratch)
        if args.model:
            make_instructions(scratched, args.prompts, 0, 0)
            model, asked = args.model, scratched / "train.jsonl"
        else:
            model, asked = (
                make_model(scratched / "model", args.width),
                make_prompts(scratched / "p.jsonl", args.prompts),
            )
        figures: dict[str, list[float]] = {name: [] for name in WAYS}
        for way, rate in timings(model, asked, args.pairs, args.maxlen, WAYS, args.rounds):
            figures[way].append(rate)
        medians = {name: statistics.median(rates) for name, rates in figures.items()}
        print(f"\n{args.prompts} prompts, K = {args.pairs}, up to {args.maxlen} tokens, {model.name}; "
              f"medians of {args.rounds} rounds")  # fmt: skip
        size, peak = parameters(weight_shapes(model)), matrix_rate()
        print(f"the matrix rate of this machine is {peak / 1e9:.0f} GFLOP/s")
        for name, rate in medians.items():
            spread = f"{min(figures[name]):.0f} to {max(figures[name]):.0f}"
            share = 2 * size * rate / peak  # of the drawn tokens alone; reading the prompts comes on top
            print(f"  {name:38s} {rate:8.0f} tok/s ({spread}), {share:.0%} of the matrix rate")
        mine, plain, seeded, call, passes = (medians[way] for way in WAYS)
        print(f"  seeded:   ours / one call   {mine / seeded:.3f}")
        print(f"  unseeded: ours / one call   {plain / call:.3f}")
        print(f"  seeded:   ours / K passes   {mine / passes:.3f}")
        print(f"  cost of prompt seeds        {1 - mine / plain:.1%}")


def memory_of(count: int, stage: str) -> None:
    """In a process of its own: peak MiB after loading the prompts, or after a whole shard with a canned engine."""
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / "model", 64)
        recipe = Recipe(
            model=str(model), prompts=str(make_prompts(Path(scratch) / "p.jsonl", count)), engine="transformers"
        )
        chat.load_tokenizer(model)

        def canned(_: str, __: Any, ___: Any, ____: Any, requests: list[Request]) -> Iterator[Any]:
            for request in requests:
                yield request, [Response(list(range(10, 210)), "length") for _ in range(recipe.pairs)]

        shards.finished_responses = canned
        if stage == "prompts":
            load_prompts(recipe.prompts, recipe)
        elif stage == "shard":
            generate_shards(recipe, Path(scratch) / "out", [Slice(0, 0)], False)
        print(f"PEAK {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")


def memory(counts: list[int]) -> None:
    """The curve: imports alone, the prompts themselves, and the whole shard."""
    print(f"{'prompts':>8} {'prompts alone, MiB':>20} {'whole shard, MiB':>18} {'the rest, MiB':>14}")
    for count in counts:
        peaks = {}
        for stage in ("nothing", "prompts", "shard"):
            command = [sys.executable, __file__, "--memory_of", str(count), "--stage", stage]
            shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peaks[stage] = int(shown.split("PEAK ")[1])
        alone = peaks["prompts"] - peaks["nothing"]
        rest = peaks["shard"] - peaks["prompts"]
        print(f"{count:>8} {alone:>20} {peaks['shard'] - peaks['nothing']:>18} {rest:>14}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="the memory curve instead of throughput")
    parser.add_argument("--prompts", type=int, default=120, help="prompts for throughput (120)")
    parser.add_argument("--pairs", type=int, default=5, help="K (5)")
    parser.add_argument("--maxlen", type=int, default=96, help="longest response (96)")
    parser.add_argument("--model", type=Path, help="a model's directory instead of the small Mistral")
    parser.add_argument("--width", type=int, default=256, help="hidden size of the model (256)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--memory_of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        memory_of(args.memory_of, args.stage)
    elif args.memory:
        memory([1_000, 10_000, 100_000])
    else:
        throughput(args)


if __name__ == "__main__":
    main()

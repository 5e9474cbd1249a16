"""Every stage on a GPU against its peer, and one iteration at full shape against the preflight's plan.

    python benchmarks/gpu.py --out runs/gpu                      everything, below an hour on a large GPU
    python benchmarks/gpu.py --out runs/gpu --only rank train-1b  some of it
    python benchmarks/gpu.py --out /tmp/try --shape tiny          the same commands with tiny shapes, on a CPU too

Reads   nothing: models with random weights at real shapes, and data of usual lengths, are made here. What a missing
        package (vllm, llm-blender) would be needed for is left out, and said.
Writes  <out>/rows.jsonl, a line as soon as it is measured, and <out>/table.md from it. Started again, it goes on with
        what is missing. The models are in <out>/world, 20 GB, and are deleted at the end.
Exit codes: 0 done, 1 something failed; the rest is measured.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

GIB = 1 << 30
Row = dict[str, Any]
has = functools.cache(lambda package: importlib.util.find_spec(package) is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where rows.jsonl and table.md go")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="which groups (all)")
    parser.add_argument("--shape", choices=["full", "tiny"], default="full")
    parser.add_argument("--keep_world", action="store_true", help="keep the models")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.group:  # in a process of its own, so that its memory and its failures are its own
        for row in GROUPS[args.group](args.out, args.shape == "tiny"):
            row = {"group": args.group, **row, "seconds": round(time.monotonic() - _BEGAN)}
            with open(args.out / "rows.jsonl", "a") as rows:
                rows.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        return 0
    for package in ("vllm", "llm_blender"):
        if not has(package):
            print(f"{package} is not installed: what needs it is left out")
    failed = []
    for group in args.only:
        command = [sys.executable, __file__, "--group", group, "--out", str(args.out), "--shape", args.shape]
        if subprocess.run(command, check=False).returncode:
            failed.append(group)
        (args.out / "table.md").write_text(table(read(args.out)))
    print(table(read(args.out)))
    if not args.keep_world:
        shutil.rmtree(args.out / "world", ignore_errors=True)
    if failed:
        print(f"failed, see above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


_BEGAN = time.monotonic()


def read(out: Path) -> list[Row]:
    """The rows that are there; a line cut off by a kill does not count."""
    rows = []
    for line in (out / "rows.jsonl").read_text().splitlines() if (out / "rows.jsonl").exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def missing(out: Path, group: str, ways: list[str]) -> list[str]:
    """The ways that are not measured yet."""
    done = {row["way"] for row in read(out) if row["group"] == group}
    return [way for way in ways if way not in done]


def world(out: Path, name: str, make: Callable[[Path], Any]) -> Path:
    """<out>/world/<name>, made where a killed try has not finished it."""
    where = out / "world" / name
    if not (where / "whole").exists():
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True)
        make(where)
        (where / "whole").touch()
    return where


def rank(out: Path, tiny: bool) -> Iterator[Row]:
    """PairRM at DeBERTa-v3-large's shape."""
    import ranking
    import torch
    import worlds

    from sppo.launch.devices import matrix_rate
    from sppo.rankers.llm_blender import load_blender

    size = "tiny" if tiny else "large"
    directory = world(out, "ranker", lambda where: worlds.pairrm(where, size)) / "PairRM"
    items = ranking.make_items(6 if tiny else 96, 5, False)
    some = items[: max(2, len(items) // 8)]  # llm-blender takes so much longer
    ways: dict[str, Callable[[], Any]] = {}
    ranker = functools.cache(lambda: ranking.load_ours(directory, 16384))
    ways["ours"] = lambda part: ranking.rank_ours(ranker(), part)
    if has("llm_blender"):
        blender = functools.cache(lambda: load_blender(directory, worlds.DEVICE))
        ways["llm-blender, batch size 1"] = lambda part: ranking.rank_theirs(blender(), part, 1)
    rate = matrix_rate()
    for way in missing(out, "rank", list(ways)):
        asked = some if way.startswith("llm") else items
        ways[way](asked[: max(2, len(asked) // 4)])  # kernels are loaded, and compiled
        if worlds.DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took = []
        for _ in range(1 if way.startswith("llm") else 3):
            began = time.perf_counter()
            ways[way](asked)
            took.append(time.perf_counter() - began)
        took = sorted(took)[len(took) // 2]
        share = ranking.useful_flops(ranker(), asked, size) / took / rate
        pairs = ranking.pairs_of(asked)
        yield {"way": way, "rate": pairs / took, "unit": "pairs/s", "share": share, "memory": peak(), "of": pairs}


def peak() -> float | None:
    """GiB of the GPU that PyTorch had allocated at most."""
    import torch

    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


def train(name: str, out: Path, tiny: bool) -> Iterator[Row]:
    """Ours and trl's DPOTrainer with sppo_hard; the reference's pass is part of it."""
    import training

    from sppo.launch.devices import matrix_rate

    name = name if not tiny else "tiny-lora" if "lora" in name else "tiny"
    ways = list(training.CONTESTANTS)[: None if "lora" not in name else 2]
    directory = out / "world" / f"train-{name}"
    tokens = directory / "tokens"

    def make(where: Path) -> None:
        tokens.write_text(str(training.make_world(where, name)))

    world(out, f"train-{name}", make)
    rate = matrix_rate()
    for way in missing(out, f"train-{'8b-lora' if 'lora' in name else '1b'}", ways):
        try:
            found = training.measure(name, way, directory)
        except SystemExit as error:  # out of memory, say: the others are still worth knowing
            yield {"way": way, "failed": str(error)[-600:]}
            continue
        each = 6 if "lora" in name else 8
        pace = int(tokens.read_text()) / found["seconds"]
        share = each * found["parameters"] * pace / rate
        yield {"way": way, "rate": pace, "unit": "tokens/s", "share": share, "memory": found["beyond"] / GIB}


def generate(name: str, out: Path, tiny: bool) -> Iterator[Row]:
    """Drawing by vLLM: ours, LLM.generate, and K passes; by transformers where vLLM is missing."""
    import worlds

    from sppo.launch.devices import matrix_rate
    from sppo.models.files import parameters, weight_shapes

    model = world(out, f"llama-{name}", lambda where: worlds.llama(where / "model", "tiny" if tiny else name)) / "model"
    count = 16 if tiny else 256 if has("vllm") else 64
    asked = world(out, f"prompts-{count}", lambda where: worlds.prompts(where / "prompts.jsonl", count))
    rate = matrix_rate()
    if has("vllm"):
        import generation

        ways = missing(out, f"generate-{name}", generation.WAYS)
        found = generation.timings(model, asked / "prompts.jsonl", 5, 32 if tiny else 512, ways, 1) if ways else ()
    else:
        found = by_transformers(model, asked / "prompts.jsonl", 16 if tiny else 256)
        found = found if missing(out, f"generate-{name}", ["transformers"]) else ()
    for way, pace in found:
        share = 2 * parameters(weight_shapes(model)) * pace / rate
        yield {"way": way, "rate": pace, "unit": "drawn tokens/s", "share": share, "memory": None}


def by_transformers(model: Path, asked: Path, maxlen: int) -> Iterator[tuple[str, float]]:
    from sppo.generation.engines import transformers
    from sppo.generation.prompts import load_prompts
    from sppo.generation.templating import to_requests
    from sppo.models.policy import open_policy
    from sppo.recipe import Recipe

    recipe = Recipe(model=str(model), prompts=str(asked), pairs=5, maxlen=maxlen, temperature=1.0, top_p=1.0)
    policy = open_policy(str(model))
    tokenizer = policy.tokenizer()
    requests = to_requests(recipe, policy, tokenizer, load_prompts(recipe.prompts, recipe)).requests
    began, tokens = time.perf_counter(), 0
    for _, answers in transformers.draw(policy, recipe, policy.stop_ids(tokenizer), requests):
        tokens += sum(len(answer.token_ids) for answer in answers)
    yield "transformers", tokens / (time.perf_counter() - began)


def iteration(out: Path, tiny: bool) -> Iterator[Row]:
    """One iteration of the whole pipeline on a full 1B: seconds of each stage, and what the preflight planned."""
    import worlds

    name = "tiny" if tiny else "1b"
    model = world(out, "llama-1b", lambda where: worlds.llama(where / "model", name)) / "model"
    ranker = world(out, "ranker", lambda where: worlds.pairrm(where, "tiny" if tiny else "large")) / "PairRM"
    count = 16 if tiny else 128
    asked = world(out, f"prompts-{count}", lambda where: worlds.prompts(where / "prompts.jsonl", count))
    if not missing(out, "iteration", ["iteration"]):
        return
    run_dir = out / "world" / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    gpu = worlds.DEVICE == "cuda"
    words = ["--model", model, "--prompts", asked / "prompts.jsonl", "--ranker", ranker, "--run_dir", run_dir]
    words += ["--iterations=1", "--pairs=5", f"--maxlen={32 if tiny else 512}", "--ranker_prompt=text"]
    words += ["--batch_size=4", "--global_batch_size=16" if tiny else "--global_batch_size=64"]
    words += [f"--engine={'vllm' if has('vllm') else 'transformers'}", "--gradient_checkpointing=false"]
    words += ["--gpus=0", "--accelerate_config=one_gpu"] if gpu else ["--gpus=none"]
    command = ["bash", str(ROOT / "scripts" / "run.sh"), *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable}
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"the iteration failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    took = time.monotonic() - began
    plan = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("iteration 1 ")]
    times = {}
    for manifest in sorted((run_dir / "iter1").rglob("*manifest.json")):
        made = json.loads(manifest.read_text())
        if "seconds" in made:
            times[str(manifest.relative_to(run_dir / "iter1")).removesuffix(".manifest.json")] = made["seconds"]
    yield {"way": "iteration", "took": round(took), "plan": plan, "times": times}


GROUPS: dict[str, Callable[[Path, bool], Iterator[Row]]] = {
    "rank": rank,
    "train-1b": functools.partial(train, "1b"),
    "train-8b-lora": functools.partial(train, "8b-lora"),
    "generate-1b": functools.partial(generate, "1b"),
    "generate-8b": functools.partial(generate, "8b"),
    "iteration": iteration,
}


def table(rows: list[Row]) -> str:
    """The rows in Markdown, with the machine and the versions."""
    import torch

    from sppo.store.manifest import version_of

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    packages = ("torch", "transformers", "trl", "vllm", "llm-blender", "triton")
    versions = ", ".join(f"{name} {version_of(name)}" for name in packages if has(name.replace("-", "_")))
    lines = [f"{where}; {versions}; `python benchmarks/gpu.py`", ""]
    lines += ["| | | rate | of the matrix rate | memory, GiB | ours against it |", "|---|---|---|---|---|---|"]
    best = {row["group"]: row["rate"] for row in rows if row["way"] in ("ours", "sppo", "generate.py")}
    for row in rows:
        if "rate" in row:
            memory = "" if row["memory"] is None else f"{row['memory']:.1f}"
            ratio = f"{best[row['group']] / row['rate']:.2f}" if row["group"] in best else ""
            cells = [
                row["group"],
                row["way"],
                f"{row['rate']:,.0f} {row['unit']}",
                f"{row['share']:.0%}",
                memory,
                ratio,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        else:
            rest = {k: v for k, v in row.items() if k not in ("group", "way", "seconds")}
            lines.append(f"| {row['group']} | {row['way']} | {json.dumps(rest)[:300]} | | | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

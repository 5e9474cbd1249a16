"""A large prompt set through the launchers and the joins, with the engines' work taken out: what else grows, and how.

    python benchmarks/scale.py --prompts 1000000 --shards 512 --launchers local slurm ray
    python benchmarks/scale.py --prompts 20000 --shards 16 --tokens 400 --launchers local      usual lengths

Responses are made up instead of drawn, and the ranker compares lengths; everything else is the pipeline's own commands.
Reads   nothing.
Writes  a directory in --scratch, which it removes; a Markdown table to the terminal: seconds of
        each step, and its largest process.
Exit codes: 0 done, 1 failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cluster  # noqa: E402
import tiny  # noqa: E402

from sppo.command.errors import run_main  # noqa: E402

# Every Python process with this in PYTHONPATH writes down its largest size, and finds an engine that makes answers up.
SITE = """
import atexit, os, re, sys, types


def draw(policy, recipe, stop_ids, requests):
    from sppo.generation.engines import Response
    for request in requests:
        length, start = int(os.environ["SPPO_SCALE_TOKENS"]), request.seed % 200 + 20
        drawn = [[(start + i) % 250 + 5 for i in range(length + k)] for k in range(recipe.pairs)]
        yield request, [Response([*ids, min(stop_ids)], "stop") for ids in drawn]


fake = types.ModuleType("sppo.generation.engines.transformers")
fake.draw = draw
sys.modules[fake.__name__] = fake


def note():
    status = open("/proc/self/status").read()
    size = int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) >> 10
    name = next((os.path.basename(word) for word in sys.argv if word.endswith(".py")), "other")
    with open(os.path.join(os.environ["SPPO_SCALE"], f"{name}-{os.getpid()}"), "w") as out:
        out.write(str(size))


atexit.register(note)
"""
RANKER = "def longer(prompt, first, second):\n    return (len(first) - len(second)) / 10\n"


class Steps:
    """Runs the pipeline's commands one after the other, and prints what each took."""

    def __init__(self, scratch: Path, label: str, env: dict[str, str], tokens: int) -> None:
        self.label, self.sizes = label, scratch / "sizes"
        self.env = {**env, "PYTHONPATH": os.pathsep.join([str(scratch / "site"), str(ROOT)])}
        self.env |= {
            "SPPO_SCALE": str(self.sizes),
            "SPPO_SCALE_TOKENS": str(tokens),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(self, name: str, *command: str | Path) -> None:
        shutil.rmtree(self.sizes, ignore_errors=True)
        self.sizes.mkdir()
        began = time.monotonic()
        subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, env=self.env, check=True, stdout=subprocess.DEVNULL
        )
        spent = time.monotonic() - began
        sizes = [int(path.read_text()) for path in self.sizes.glob("*.py-*")]
        row = [self.label, name, f"{spent:.1f}", str(max(sizes, default=0)), str(len(sizes))]
        print(f"| {' | '.join(row)} |", flush=True)


@contextmanager
def place(launcher: str, scratch: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """(the launcher's flags, its environment): three processes at once here, three machines on a cluster."""
    with ExitStack() as stack:
        if launcher == "local":
            yield ["--gpus=none,none,none"], dict(os.environ)
        elif launcher == "ray":
            made = stack.enter_context(cluster.ray(3))
            yield ["--launcher=ray", "--gpus=none", f"--ray_address={made.address}"], dict(os.environ)
        elif reason := cluster.why_no_slurm():
            raise SystemExit(f"slurm: {reason}")
        else:
            made = stack.enter_context(cluster.slurm(scratch / "slurm", 3))
            yield ["--launcher=slurm", "--gpus=none"], stack.enter_context(made.allocation(3))


def measure(args: argparse.Namespace, scratch: Path) -> None:
    for name, text in (("sitecustomize", SITE), ("ranker", RANKER)):
        (scratch / "site").mkdir(parents=True, exist_ok=True)
        (scratch / "site" / f"{name}.py").write_text(text)
    model = tiny.mistral(scratch / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    prompts = scratch / "prompts.jsonl"
    with open(prompts, "w") as out:
        out.writelines(json.dumps({"prompt": f"What is {i} and what is it for, in a few words?"}) + "\n"
                       for i in range(args.prompts))  # fmt: skip
    print(
        f"{args.prompts:,} prompts x 5, {args.tokens} tokens and more, {args.shards} shards, {os.cpu_count()} cores\n"
    )
    print("| launcher | step | seconds | largest process, MiB | processes |\n|---|---|---|---|---|")
    for launcher in args.launchers:
        data = scratch / launcher
        with place(launcher, scratch) as (where, env):
            steps = Steps(scratch, launcher, env, args.tokens)
            shards = [str(ROOT / "tests/shards.py"), *where, f"--shards={args.shards}", f"--logs={data}/logs"]
            drawing = [ROOT / "scripts/generate.py", "--model", model, "--prompts", prompts, "--engine=transformers"]
            drawing += ["--recipe=recipes/sppo/demo.yaml", f"--maxlen={args.tokens + 50}", f"--output_dir={data}"]
            ranking = [
                ROOT / "scripts/rank.py",
                f"--output_dir={data}",
                "--ranker=ranker:longer",
                "--recipe=recipes/sppo/demo.yaml",
            ]
            steps.run("read the prompts", *drawing, "--only_prompts")
            out = f"--shards_dir={data / 'responses'}"
            steps.run("generate", *shards, out, "--stage=generate", "--", sys.executable, *drawing)
            steps.run("combine", ROOT / "scripts/combine_generate.py", f"--output_dir={data}")
            out = f"--shards_dir={data / 'ranking'}"
            steps.run("rank", *shards, out, "--stage=rank", "--", sys.executable, *ranking)
            steps.run("compute_prob", ROOT / "scripts/compute_prob.py", f"--output_dir={data}")
        files = [path for path in data.rglob("*") if path.is_file()]
        total = sum(path.stat().st_size for path in files)
        print(f"| {launcher} | on disk | | | {len(files)} files, {total / 2**30:.2f} GiB |", flush=True)
        shutil.rmtree(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=6, help="of a prompt's shortest response (6)")
    parser.add_argument("--launchers", nargs="+", default=["local", "slurm", "ray"])
    parser.add_argument("--scratch", type=Path, help="where there is room (default: the system's temporary directory)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        measure(args, Path(scratch))


if __name__ == "__main__":
    run_main(main)

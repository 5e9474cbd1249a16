"""A whole run under faults: killed in every stage, damaged, short of disk. It ends with the same data and weights.

What it must equal is a run of two iterations that nothing disturbed (the fixture `whole`).
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import preferences
import pyarrow.parquet as pq
import pytest
import tiny
from preferences import data_directory
from safetensors.torch import load_file
from test_ranking import asked, function_ranker

from sppo.store.files import read_json

pytestmark = pytest.mark.slow

PROMPTS = [{"prompt": f"Name {i} rivers" + " of Europe" * (i % 5)} for i in range(14)]


class Moment(NamedTuple):
    """A stage of a run to be killed in, and the files by which one sees how far it is."""

    iteration: str
    name: str
    working: str  # there once it is at work
    done: str  # there once it is done


STAGES = [
    Moment("iter1", "generate", "data/responses/*.journal", "data/responses.parquet"),
    Moment("iter1", "combine", "data/responses.manifest.json.started", "data/responses.manifest.json"),
    Moment("iter1", "rank", "data/ranking/*.journal", "data/ranking/*.manifest.json"),
    Moment("iter1", "compute_prob", "data/train.manifest.json.started", "data/train.manifest.json"),
    Moment("iter1", "reference", "model.partial", "data/reference/*.safetensors"),
    Moment("iter1", "train", "model.partial/checkpoint-[2-9]/complete.json", "model"),
    Moment("iter1", "save", "model.partial/final", "model"),
    Moment("iter0", "report", "eval/responses/*.journal", "eval/responses.parquet"),
    Moment("iter2", "generate", "data/responses/*.journal", "data/responses.parquet"),
    Moment("iter2", "rank", "data/ranking/*.journal", "data/ranking/*.manifest.json"),
    Moment("iter2", "train", "model.partial/metrics.jsonl", "model"),
    Moment("iter2", "report", "eval/responses/*.journal", "eval/report.json"),
    Moment("iter2", "matrix", "eval/against-iter1-*.journal", "eval/against-iter1-*.manifest.json"),
]


def furnish(models: Path, world: Path) -> Path:
    """Put policy, ranker and prompts into a directory."""
    shutil.copytree(models / "mistral", world / "policy")
    shutil.copytree(models / "PairRM", world / "PairRM")
    shutil.copytree(models / "tiny-deberta", world / "tiny-deberta")
    tiny.write_jsonl(world / "prompts.jsonl", PROMPTS)
    return world


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with policy, prompts and held-out prompts, and `whole`: the undisturbed run."""
    world = furnish(models, tmp_path_factory.mktemp("world"))
    tiny.write_jsonl(world / "held-out.jsonl", [{"prompt": f"What is {i}?"} for i in range(4)])
    tiny.succeed(*command(world, world / "whole"))
    return world


def command(world: Path, run: Path, report: bool = True) -> list[str]:
    words = ["bash", "run_sppo_mistral.sh", "--model", world / "policy", "--prompts", world / "prompts.jsonl"]
    words += ["--ranker", world / "PairRM", "--recipe", "recipes/sppo/demo.yaml", "--engine=transformers", "--pairs=3"]
    words += ["--iterations=2", "--maxlen=24", "--test_size=2", "--gpus=none"]
    words += ["--num_train_epochs=5", "--global_batch_size=8", "--batch_size=4", "--save_steps=1"]
    words += ["--learning_rate=1e-3", "--run_dir", run]
    words += ["--eval_prompts", world / "held-out.jsonl", "--evaluate"] if report else []
    words += ["--skip_preflight"]  # which would refuse some of these, and takes its time
    return [str(w) for w in words]


def at_work(run: Path, stage: Moment) -> bool:
    """A journal has to have an item in it."""
    found = (run / stage.iteration).glob(stage.working)
    return any(path.suffix != ".journal" or len(lines(path)) > 1 for path in found)


def is_done(run: Path, stage: Moment) -> bool:
    return any((run / stage.iteration).glob(stage.done))


def kill_in(stage: Moment, words: list[str], run: Path, delay: float) -> bool:
    """SIGKILL the driver `delay` seconds into a stage, or as soon as the stage is over; whether it was in it."""
    process = tiny.start(*words, slow=run, log=Path(f"{run}.log"))
    tiny.wait_for(process, lambda: at_work(run, stage) or is_done(run, stage))
    until = time.monotonic() + delay
    tiny.kill_when(process, lambda: is_done(run, stage) or time.monotonic() > until, run)
    return not is_done(run, stage)


def files(run: Path) -> dict[str, Path]:
    """All but logs, and what a stage kept of an output that was edited or damaged."""
    found = [p for p in sorted(run.rglob("*")) if p.is_file() and "logs" not in p.parts]
    return {str(p.relative_to(run)): p for p in found if p.suffix != ".changed"}


def refused(words: list[str], run: Path, message: str) -> None:
    """The driver ends with 1 and the message, and leaves every file as it was (but for the recipe as now asked for)."""

    def state() -> dict[str, bytes]:
        return {name: path.read_bytes() for name, path in files(run).items() if path.name != "recipe.yaml"}

    before = state()
    done = tiny.run(*words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert state() == before


def said(run: Path) -> str:
    return "".join(p.read_text() for p in [Path(f"{run}.log"), *run.glob("iter*/logs/*.log")] if p.exists())


def assert_same(one: Path, other: Path, but: str = "nothing") -> None:
    """Equal data sets, weights, steps and reports, and no file more or less."""
    expected = {name: path for name, path in files(one).items() if not name.startswith(but)}
    for name, path in expected.items():
        if path.suffix == ".parquet":
            assert pq.read_table(path).equals(pq.read_table(other / name)), name
        elif path.suffix == ".safetensors":
            first, second = load_file(path), load_file(other / name)
            assert first.keys() == second.keys()
            assert all(first[k].equal(second[k]) for k in first), name
        elif path.name == "metrics.jsonl":
            steps = [line["step"] for line in preferences.metrics((other / name).parent)]
            assert steps == [line["step"] for line in preferences.metrics(path.parent)]
        elif path.name in ("summary.json", "report.json", "matrix.json"):
            assert read_json(path) == read_json(other / name)
    assert expected.keys() == files(other).keys()


def lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:  # a stage has just come to its end
        return []


def test_killed_in_every_stage_and_damaged_in_between(world: Path, tmp_path: Path) -> None:
    rng = random.Random(6)
    run = tmp_path / "killed"
    words = command(world, run)
    hit = []
    for stage in STAGES:
        short = stage.name in ("combine", "compute_prob", "save")
        if kill_in(stage, words, run, 0 if short else rng.random() * 0.2):
            hit.append((stage.iteration, stage.name))
        for journal in run.glob("iter*/data/r*/*.journal"):
            first, *items = lines(journal)
            tiny.flip(journal, rng.random() * len(first) / journal.stat().st_size)
            if items:
                tiny.flip(journal, (len(first) + rng.random() * len(items[0])) / journal.stat().st_size)
        if (stage.iteration, stage.name) == ("iter1", "rank"):
            refused([*words, "--temperature=0.9"], run, "settings.temperature: ")
            tiny.write_jsonl(world / "prompts.jsonl", PROMPTS[1:])
            refused(words, run, "inputs.prompts: ")
            tiny.write_jsonl(world / "prompts.jsonl", PROMPTS)
            weights = world / "policy" / "model.safetensors"
            content = weights.read_bytes()
            tiny.flip(weights, 1)  # a newer model under the same path
            refused(words, run, "inputs.model: ")
            weights.write_bytes(content)
        if (stage.iteration, stage.name) == ("iter1", "train"):
            refused([*words, "--beta=0.2"], run, "settings.beta: ")
            work = run / "iter1" / "model.partial"
            whole = next(c.parent for c in work.glob("checkpoint-*/complete.json"))
            (whole / "optimizer.pt").unlink()  # transformers would go on without it, in silence
            (work / "checkpoint-99").mkdir()  # half there, as a kill leaves it
            shutil.copy(whole / "trainer_state.json", work / "checkpoint-99")
    print("killed in", hit)
    assert len(hit) >= 11, hit
    tiny.succeed(*words)
    assert "damaged lines" in said(run)
    assert "is not used: missing or changed since it was written: optimizer.pt" in said(run)
    assert_same(world / "whole", run)


def test_outputs_damaged_or_deleted_are_made_again(world: Path, tmp_path: Path) -> None:
    run = shutil.copytree(world / "whole", tmp_path / "run")
    one, two = run / "iter1", run / "iter2"
    tiny.flip(one / "data" / "responses" / "shard-00000.parquet", 0.5)
    shutil.rmtree(one / "data" / "ranking")
    shutil.rmtree(one / "model")
    os.truncate(two / "data" / "responses.parquet", 1000)
    (two / "data" / "train.parquet").unlink()
    tiny.flip(two / "model" / "model.safetensors", 0.9)
    (two / "eval" / "report.json").unlink()
    shutil.rmtree(run / "iter0")
    shown = tiny.succeed(*command(world, run))
    assert shown.count("missing or changed since; making them again") >= 2  # a report is made again in silence
    assert_same(world / "whole", run)


def test_lost_held_out_answers_and_comparisons_are_made_again(world: Path, tmp_path: Path) -> None:
    """The driver asks what is done before it runs a step: a file that is gone must not end it there."""
    run = shutil.copytree(world / "whole", tmp_path / "run")
    (run / "iter1" / "eval" / "responses.parquet").unlink()
    (run / "iter2" / "eval" / "against-iter0-ranker.parquet").unlink()
    tiny.succeed(*command(world, run))
    assert_same(world / "whole", run)


def test_a_shard_that_dies_ends_the_run_and_costs_nothing_and_nobody_else_may_work_there(
    world: Path, tmp_path: Path
) -> None:
    """Two shards of a user's own ranker, which waits after some answers until this test has done its worst."""
    run = tmp_path / "run"
    log, env = function_ranker(tmp_path)
    (tmp_path / "hold").write_text("8")
    words = [*command(world, run, False), "--iterations=1", "--gpus=none,none", "--accelerate_config=cpu"]
    words += ["--ranker=asked:logit"]
    process = tiny.start(*words, slow=run, log=Path(f"{run}.log"), **env)
    tiny.wait_for(process, lambda: log.exists() and sum(asked(log).values()) == 2 * 8)
    second = tiny.run(*words, **env)
    assert second.returncode == 1
    assert "is at work in" in second.stderr
    victims = [pid for pid, line in tiny.processes(run, b"rank.py").items() if b"\0--data_frac\0001\0" in line]
    os.kill(victims[0], signal.SIGKILL)
    assert process.wait(60) == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL (out of memory?)" in said(run)
    assert not tiny.processes(run, b"rank.py")
    (tmp_path / "hold").unlink()
    tiny.succeed(*words, **env)
    assert sum(asked(log).values()) - len(asked(log)) <= 2 * 2  # of the prompt that each shard was in
    one, other = world / "whole" / "iter1" / "data", run / "iter1" / "data"
    assert pq.read_table(one / "responses.parquet").equals(pq.read_table(other / "responses.parquet"))
    for i in (0, 1):
        assert read_json(other / "ranking" / f"shard-0000{i}.manifest.json")["counts"]["written"] == 7


# 1.5 GB more than this process has with everything imported and its threads started, then the script
LIMITED = """
import re, resource, runpy, sys
import torch, transformers, scipy.optimize, sppo.rankers._pairrm_network
(torch.ones(999, 999) @ torch.ones(999, 999)).exp().sum()
held = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (held + 1_500_000_000,) * 2)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_worker_out_of_memory_says_what_to_lower(models: Path, tmp_path: Path) -> None:
    responses = [[f"{word} " * 300 for word in ("one", "two", "three")]] * 3
    out = data_directory(tmp_path / "data", responses)
    shutil.rmtree(out / "ranking")
    words = ["scripts/rank.py", "--output_dir", out, "--ranker", models / "PairRM", "--pairs=3", "--ranker_prompt=text"]
    done = tiny.run(sys.executable, "-c", LIMITED, *words)
    assert done.returncode == 1, done.stderr
    assert "out of memory" in done.stderr
    assert "--batch_tokens" in done.stderr
    assert "Traceback" not in done.stderr
    tiny.succeed(*words)
    assert pq.read_metadata(out / "ranking" / "shard-00000.parquet").num_rows == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_is_full_in_every_stage_costs_nothing(world: Path, tmp_path: Path) -> None:
    """The run's directory on a file system that grows only when the run has failed for want of space."""
    disk = tmp_path / "disk"
    disk.mkdir()
    first, *larger = 64, 512, 1280, 8192  # KiB
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={first}k", "tmpfs", disk], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    failures = []
    try:
        words = [*command(world, disk / "run", False), "--iterations=1"]
        for size in larger:
            done = tiny.run(*words)
            shown = done.stdout + done.stderr
            assert done.returncode == 1, shown
            assert "the disk is full; make room and run the same command" in shown
            failures += re.findall("=== (.*): failed;", shown)
            subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
        print("full in", failures)
        assert set(failures) == {"iteration 1: generate", "iteration 1: train"}
        tiny.succeed(*words)
        assert_same(world / "whole" / "iter1", disk / "run" / "iter1", but="eval/")
    finally:
        subprocess.run(["umount", disk], check=True)

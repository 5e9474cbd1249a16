"""The run that tests put on clusters, and what it must equal: the same on one machine, to the bit."""

from __future__ import annotations

import os
from pathlib import Path

import preferences
import pyarrow.parquet as pq
import pytest
import tiny
from filelock import FileLock
from safetensors.torch import load_file
from test_faults import STAGES, furnish

ONE = [stage for stage in STAGES if stage.iteration == "iter1" and stage.name != "report"]
# the same on every machine: how many threads there are, and where the ranker is
SAME = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT / "tests")}


def make_world(models: Path, factory: pytest.TempPathFactory) -> Path:
    """A directory with policy and prompts, and `whole`: the run of one machine. Test processes make it once."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    world, made = root / "cluster-world", root / "cluster-world.made"
    with FileLock(root / "cluster-world.lock"):
        if not made.exists():
            furnish(models, world)
            tiny.succeed(*command(world, world / "whole"), **SAME)
            made.touch()
    return world


def command(world: Path, run: Path, *flags: str) -> list[str]:
    """One iteration, in two shards; training in two processes.

    The ranker is a function, so that ranking starts at once: what these tests kill is much, and often. PairRM is
    killed in test_faults.py.
    """
    words = ["bash", "run_sppo_mistral.sh", "--name=run", "--model", world / "policy", "--ranker=tiny:longer"]
    words += ["--prompts", world / "prompts.jsonl", "--recipe=recipes/sppo/demo.yaml", "--engine=transformers"]
    words += ["--iterations=1", "--pairs=3", "--maxlen=24", "--test_size=2", "--gpus=none", "--shards=2"]
    words += ["--num_train_epochs=5", "--global_batch_size=8", "--batch_size=4", "--save_steps=1"]
    words += ["--learning_rate=1e-3", "--accelerate_config=multi_cpu", "--skip_preflight", "--run_dir", run, *flags]
    return [str(word) for word in words]


def assert_same(world: Path, run: Path) -> None:
    """Equal data sets, weights and steps, and nothing half done."""
    one, other = world / "whole" / "iter1", run / "iter1"
    for path in sorted((one / "data").rglob("*.parquet")):
        found = other / "data" / path.relative_to(one / "data")
        assert pq.read_table(path).equals(pq.read_table(found)), found
    first, second = (load_file(here / "model" / "model.safetensors") for here in (one, other))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    steps = [[line["step"] for line in preferences.metrics(here / "model")] for here in (one, other)]
    assert steps[0] == steps[1]
    assert not list(other.rglob("*.journal"))
    assert not (other / "model.partial").exists()


def old_peft(directory: Path) -> Path:
    """A directory that, in PYTHONPATH, makes peft another version than it is elsewhere."""
    (directory / "peft-0.1.dist-info").mkdir(parents=True)
    (directory / "peft-0.1.dist-info" / "METADATA").write_text("Name: peft\nVersion: 0.1\n")
    return directory


def nothing_left(run: Path) -> bool:
    return not [line for line in tiny.processes(run).values() if b"pytest" not in line]

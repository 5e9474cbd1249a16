"""Runs on a real Ray cluster whose machines die: the end is what one machine makes, to the bit.

What it must equal is the local run `whole` (cluster_runs.make_world). Every fault is at a random moment of its stage.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster
import cluster_runs
import pytest
import tiny
from cluster_runs import ONE, SAME, assert_same, command, nothing_left, old_peft
from test_faults import at_work, is_done

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cluster_runs.make_world(models, tmp_path_factory)


@pytest.fixture
def ray() -> Iterator[Any]:
    """A cluster of each test's own: one whose machines have died often may let tasks wait until another one comes."""
    pytest.importorskip("ray")
    with cluster.ray(3) as made:
        yield made


def drive(ray: Any, world: Path, run: Path) -> subprocess.Popen[bytes]:
    """A driver on the cluster, in the background; its disk is slow."""
    words = command(world, run, "--launcher=ray", f"--ray_address={ray.address}", "--nodes=2")
    return tiny.start(*words, slow=run, log=Path(f"{run}.log"), **SAME)


def busy_nodes(ray: Any, run: Path) -> list[Any]:
    """The machines of the cluster that run something of a run: their raylets have it among their children."""
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in ray.worker_nodes}
    found = []
    for pid in tiny.processes(run):
        while pid > 1 and pid not in raylets:
            try:
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                pid = 0
        found += [raylets[pid]] if pid in raylets else []
    return found


def trainers() -> list[int]:
    """Ray's workers that hold a part of a training: Ray names them so while they do."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found += [int(path.parent.name)] if path.read_bytes().startswith(b"ray::train") else []
    return found


def said(run: Path) -> str:
    return Path(f"{run}.log").read_text()


def test_a_ray_node_dies_in_every_stage_and_another_comes(ray: Any, world: Path, tmp_path: Path) -> None:
    """The driver goes on by itself: Ray starts a shard again elsewhere, and training as a whole."""
    rng, run, hit = random.Random(14), tmp_path / "run", []
    process = drive(ray, world, run)
    for stage in ONE:
        tiny.wait_for(process, lambda stage=stage: at_work(run, stage) or is_done(run, stage))
        time.sleep(rng.random() * 0.2)
        victim = rng.choice(busy_nodes(ray, run) or list(ray.worker_nodes))
        if not is_done(run, stage):
            hit.append(stage.name)
        ray.remove_node(victim, allow_graceful=False)
        ray.add_node(num_cpus=1)
    print("killed in", hit)
    assert process.wait(600) == 0, said(run)
    assert len(hit) >= 5, hit
    assert "a machine is lost" in said(run)
    assert_same(world, run)
    tiny.wait_until(lambda: nothing_left(run), 60)


def test_what_is_killed_on_ray_goes_on(ray: Any, world: Path, tmp_path: Path) -> None:
    """A worker of Ray's: Ray starts it again. A shard, a rank or the driver: the same command goes on."""
    run = tmp_path / "run"
    plan = [(ONE[0], b"scripts/run.sh"), (ONE[2], b"rank.py"), (ONE[5], b"run_sppo.py"), (ONE[5], b"scripts/run.sh")]
    for stage, victim in plan:
        process = drive(ray, world, run)
        pids = tiny.wait_for(process, lambda s=stage, v=victim: at_work(run, s) and [*tiny.processes(run, v)])
        os.kill(process.pid if victim == b"scripts/run.sh" else pids[-1], signal.SIGKILL)
        assert process.wait(600) != 0
        tiny.wait_until(lambda: nothing_left(run), 60)
    process = drive(ray, world, run)
    os.kill(tiny.wait_for(process, lambda: tiny.processes(run, b"run_sppo.py") and trainers())[0], signal.SIGKILL)
    assert process.wait(600) == 0, said(run)
    assert_same(world, run)


def test_a_ray_node_with_other_packages_is_named_before_any_work(ray: Any, world: Path, tmp_path: Path) -> None:
    old = old_peft(tmp_path / "old")
    odd = ray.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(old)})
    words = command(world, tmp_path / "run", "--launcher=ray", f"--ray_address={ray.address}")
    refused = tiny.run(*words, **SAME)
    ray.remove_node(odd)
    assert refused.returncode == 1, refused.stdout
    assert "the machines are not ready:" in refused.stderr
    assert re.search(r"peft is \S+, and \S+ on .*; install one version", refused.stderr)
    assert not list((tmp_path / "run").rglob("*.journal"))


def test_no_cluster_at_the_address_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    words = [sys.executable, "tests/shards.py", "--launcher=ray", "--gpus=none"]
    words += ["--ray_address=127.0.0.1:9", "--", "true"]
    done = tiny.run(*words)
    assert done.returncode == 1
    assert "--ray_address 127.0.0.1:9: no Ray cluster" in done.stderr
    assert "Traceback" not in done.stderr

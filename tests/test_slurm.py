"""Runs on a real Slurm whose machines die: the end is what one machine makes, to the bit.

What it must equal is the local run `whole` (cluster_runs.make_world). Every fault is at a random moment of its stage.
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
from collections.abc import Callable, Iterator
from pathlib import Path

import cluster
import cluster_runs
import preferences
import pytest
import tiny
from cluster_runs import ONE, SAME, assert_same, command, nothing_left, old_peft
from safetensors.torch import load_file
from test_faults import at_work, is_done

pytestmark = pytest.mark.slow
SMALL = "--cpus-per-task=1 --mem=1000"
ENDS = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cluster_runs.make_world(models, tmp_path_factory)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Slurm]:
    if reason := cluster.why_no_slurm():
        pytest.skip(reason)
    with cluster.slurm(tmp_path_factory.mktemp("slurm"), nodes=3, gpus=2) as made:
        yield made


class Job:
    """A run as a job, submitted by the driver; its disk is slow, so that short moments last."""

    def __init__(self, slurm: cluster.Slurm, world: Path, run: Path, sbatch: str = "", delay: float = 0.2) -> None:
        self.slurm, self.run = slurm, run
        flags = ("--launcher=slurm", "--nodes=2", f"--sbatch={SMALL} {sbatch}")
        slow = {"PYTHONPATH": f"{tiny.ROOT}/tests/slow_disk:{tiny.ROOT}/tests", "SPPO_TEST_SLOW": str(run)}
        slow |= {"SPPO_TEST_DELAY": str(delay), "SPPO_TEST_HELD": f"{run}.held"}
        shown = tiny.succeed(*command(world, run, *flags), **{**slurm.env, **SAME, **slow})
        self.pending_since, self.asked, self.answer = time.monotonic(), 0.0, ""
        self.number = re.search(r"submitted: job (\d+)", shown)[1]

    def shown(self) -> str:
        return (self.run / "logs" / f"run-{self.number}.log").read_text()

    def told(self) -> str:
        """For a test that fails: the job's log, and what Slurm and Python said in the newest log of its work."""
        newest = max(self.run.glob("iter*/logs/*.log"), key=lambda path: path.stat().st_mtime)
        lines = [line for line in newest.read_text().splitlines() if re.search(r"^slurm|^srun|Error|signal", line)]
        return "\n".join([self.shown(), f"{newest}:", *lines])

    def ask(self, field: str) -> str:
        """What Slurm knows of it, at most a second old: to be asked all the time would keep a core busy."""
        if time.monotonic() > self.asked + 1:
            self.answer, self.asked = self.slurm.ask("scontrol", "show", "job", self.number), time.monotonic()
        found = re.search(rf"\b{field}=(\S+)", self.answer)
        return found[1] if found else ""

    def state(self) -> str:
        return self.ask("JobState")

    def start_again(self) -> None:
        """Spare a job that was requeued the two minutes that Slurm lets it wait.

        Not its first 10 seconds, and not while Slurm has a signal of the job's former start to send: one that a dead
        node did not take is sent again a minute later, and would end the new start.
        """
        if self.state() != "PENDING":
            self.pending_since = time.monotonic()
        if time.monotonic() < self.pending_since + 10 or self.ask("Reason") != "BeginTime":
            return
        to_send = self.slurm.ask("sdiag").partition("Pending RPC statistics")[2]
        if not re.search("REQUEST_(SIGNAL|TERMINATE|ABORT|KILL)", to_send):
            self.slurm.ask("scontrol", "update", f"JobId={self.number}", "StartTime=now")
            self.asked = 0.0

    def wait(self, moment: Callable[[], tiny.T], seconds: float = 600) -> tiny.T:
        """Until a moment comes; what it found then. The job must not have ended before it."""
        deadline = time.monotonic() + seconds
        while not (found := moment()):
            self.start_again()
            assert self.state() not in ENDS or moment(), f"{self.state()}\n{self.told()}"
            assert time.monotonic() < deadline, f"that moment did not come\n{self.told()}"
            time.sleep(0.05)
        return found

    def end(self) -> str:
        """Wait for its end; the state in which it ended."""
        deadline = time.monotonic() + 900
        while self.state() not in (*ENDS, "NODE_FAIL"):
            self.start_again()
            assert time.monotonic() < deadline, f"it does not end\n{self.told()}"
            time.sleep(0.05)
        tiny.wait_until(lambda: nothing_left(self.run), 60)
        return self.state()

    def nodes(self) -> list[str]:
        self.wait(lambda: self.ask("NodeList") not in ("", "(null)"))
        return self.slurm.ask("scontrol", "show", "hostnames", self.ask("NodeList")).split()


def pids(run: Path, name: bytes) -> list[int]:
    """The processes of a run with a script in their commands, but for those that only wait for it on another node."""
    found = []
    for pid, line in tiny.processes(run, name).items():
        program, script, *_ = line.split(b"\0")
        if program.endswith(b"python") or script.endswith(b"scripts/run.sh"):
            found.append(pid)
    return found


def in_allocation(slurm: cluster.Slurm, *words: str | Path, gpus: bool = False) -> subprocess.CompletedProcess[str]:
    salloc = ["salloc", "--quiet", "--nodes=2", "--nodelist=n2,n3", "--ntasks-per-node=1", *SMALL.split()]
    if gpus:
        salloc += ["--gpus-per-node=2", "--cpus-per-task=2"]
    return tiny.run(*salloc, *words, **{**slurm.env, **SAME})


class TestNodes:
    """What happens on its nodes. Each class has a test process of its own in run_tests.sh --all, and so a Slurm."""

    def test_a_node_dies_in_every_stage_of_a_slurm_job(self, slurm: cluster.Slurm, world: Path, tmp_path: Path) -> None:
        """Slurm puts the job back into the queue, and on whatever nodes it goes on. Nobody has to do anything."""
        rng, run, hit = random.Random(13), tmp_path / "run", []
        job = Job(slurm, world, run)
        for number, stage in enumerate(ONE):
            job.wait(lambda stage=stage: at_work(run, stage) or is_done(run, stage))
            time.sleep(rng.random() * 0.2)
            victim = job.nodes()[number % 2]  # the first is the one that the driver runs on
            if not is_done(run, stage):
                hit.append((stage.name, victim))
            before = job.ask("Restarts")
            slurm.kill(victim)
            job.wait(
                lambda before=before: job.state() in ("PENDING", "COMPLETING") or job.ask("Restarts") != before, 90
            )
            slurm.revive(victim)
        print("killed in", hit)
        assert len(hit) >= 5, hit
        assert job.end() == "COMPLETED", job.told()
        assert int(job.ask("Restarts")) == len(ONE)
        assert_same(world, run)

    def test_zero_3_over_two_machines_trains_what_one_machine_does(
        self, slurm: cluster.Slurm, models: Path, tmp_path: Path
    ) -> None:
        """A process on each, by accelerate launch with machine rank, address and port."""
        data = preferences.write(tmp_path / "data", preferences.rows(21))
        words = ["bash", "scripts/pipeline.sh", *preferences.SMALL, "--num=2", "--gpus=none", f"--dataset={data}"]
        words += [f"--model={models / 'qwen3'}", "--accelerate_config=cpu_zero3"]
        tiny.succeed(*words, f"--output_dir={tmp_path / 'one' / 'model'}", **SAME)
        shutil.rmtree(data / "reference")
        done = in_allocation(slurm, *words, "--launcher=slurm", f"--output_dir={tmp_path / 'two' / 'model'}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 x 2 x 2 rows a step" in (tmp_path / "two" / "logs" / "train.1.log").read_text()
        first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
        assert first.keys() == second.keys()
        assert all(first[name].equal(second[name]) for name in first)

    def test_a_disk_that_is_full_on_one_node_costs_nothing(
        self, slurm: cluster.Slurm, world: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        full = f"export SPPO_TEST_FULL={run}/iter1/data/responses\n"
        full += f"export PYTHONPATH={tiny.ROOT}/tests/slow_disk:{tiny.ROOT}/tests:{tiny.ROOT}\n"
        (slurm.root / "n3.env").write_text(full)
        words = command(world, run, "--launcher=slurm")
        refused = in_allocation(slurm, *words)
        (slurm.root / "n3.env").unlink()
        assert refused.returncode == 1, refused.stdout
        assert "the disk is full; make room and run the same command to go on" in refused.stderr
        done = in_allocation(slurm, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        assert_same(world, run)

    def test_each_step_sees_its_own_gpus(self, slurm: cluster.Slurm, tmp_path: Path) -> None:
        """Two nodes of two GPUs: four shards at once, one GPU each. These GPUs are only named."""
        mine = "os.environ['SLURMD_NODENAME'], os.environ['CUDA_VISIBLE_DEVICES']"
        show = f"import os, time; print('mine:', {mine}); time.sleep(3)"
        launch = [sys.executable, "tests/shards.py", "--launcher=slurm", f"--logs={tmp_path}", "--stage=x"]
        done = in_allocation(slurm, *launch, "--", sys.executable, "-c", show, gpus=True)
        assert done.returncode == 0, done.stderr
        said = [re.search("mine: (.*)", (tmp_path / f"x-{i}.1.log").read_text())[1] for i in range(4)]
        assert sorted(said) == ["n2 0", "n2 1", "n3 0", "n3 1"]


class TestJobs:
    """What happens to a job as a whole."""

    def test_a_slurm_job_that_is_requeued_or_meets_its_time_limit_goes_on(
        self, slurm: cluster.Slurm, world: Path, tmp_path: Path
    ) -> None:
        """Its time is three minutes. It is told 60 seconds before, or up to 60 still earlier, as Slurm does; saves, and
        goes back into the queue by itself. So that it meets that time in training, the disk holds it there."""
        run, held = tmp_path / "run", tmp_path / "run.held"
        job = Job(slurm, world, run, "--time=3 --signal=B:USR1@60")
        job.wait(lambda: at_work(run, ONE[0]) or is_done(run, ONE[0]))
        slurm.ask("scontrol", "requeue", job.number)
        job.wait(lambda: at_work(run, ONE[2]) or is_done(run, ONE[2]))
        slurm.ask("scancel", "--signal=USR1", "--batch", job.number)  # as at a preemption
        job.wait(lambda: job.shown().count("saved; back into the queue") == 1)
        job.wait(lambda: at_work(run, ONE[5]))
        held.touch()
        job.wait(lambda: job.shown().count("saved; back into the queue") == 2)
        held.unlink()
        assert job.end() == "COMPLETED", job.told()
        assert_same(world, run)

    def test_a_slurm_job_whose_processes_are_killed_fails_and_the_same_command_goes_on(
        self, slurm: cluster.Slurm, world: Path, tmp_path: Path
    ) -> None:
        run, said = tmp_path / "run", []
        job = Job(slurm, world, run, delay=1)
        job.wait(lambda: at_work(run, ONE[0]))
        slurm.ask("scancel", job.number)
        assert job.end() == "CANCELLED", job.shown()  # and does not go back into the queue
        for stage, victim in ((ONE[0], b"--data_frac"), (ONE[5], b"run_sppo.py"), (ONE[5], b"scripts/run.sh")):
            job = Job(slurm, world, run, delay=1)
            victims = job.wait(lambda stage=stage, victim=victim: at_work(run, stage) and pids(run, victim))
            os.kill(victims[-1], signal.SIGKILL)
            assert job.end() == "FAILED", job.shown()
            said.append(job.shown())
        assert re.search(r"generate [0-2] .*; the end of ", said[0])
        assert "=== iteration 1: train: failed; run the same command again" in said[1]
        assert Job(slurm, world, run).end() == "COMPLETED"
        assert_same(world, run)

    def test_a_node_without_the_environment_is_named_before_any_work(
        self, slurm: cluster.Slurm, world: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        words = [word for word in command(world, run, "--launcher=slurm", "--dry_run") if word != "--skip_preflight"]
        (slurm.root / "n3.env").write_text("export PYTHONHOME=/nowhere\n")
        refused = in_allocation(slurm, *words)
        assert refused.returncode == 1
        assert re.search(r"no +n3: cannot be used: ", refused.stdout), refused.stdout
        assert "ready: no: 1 problem" in refused.stdout
        old = old_peft(tmp_path / "old")
        (slurm.root / "n3.env").write_text(f"export PYTHONPATH={old}:{tiny.ROOT}\n")
        refused = in_allocation(slurm, *words)
        (slurm.root / "n3.env").unlink()
        assert refused.returncode == 1
        assert re.search(r"no +n3: peft is 0\.1, and \S+ on n2; install one version", refused.stdout), refused.stdout

"""Killed at any moment and started again, a training ends as if nothing had happened: losses and weights to the bit."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import preferences
import pytest
import tiny
from safetensors.torch import load_file

from sppo.training.checkpoints import COMPLETE

pytestmark = pytest.mark.slow

TIMES = {"tokens_per_second", "seconds_left"}  # what no run shares with another


def assert_same(one: Path, other: Path, weights: str = "model.safetensors") -> None:
    first, second = (
        [{k: v for k, v in line.items() if k not in TIMES} for line in preferences.metrics(m)] for m in (one, other)
    )
    assert [line["step"] for line in second] == sorted({line["step"] for line in second})  # no step twice
    assert first == second
    before, after = load_file(one / weights), load_file(other / weights)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def lines(work: Path) -> int:
    path = work / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("flags", [(), ("--use_peft", "--loss_type=sppo_all", "--logging_steps=3")])
def test_one_process_killed_at_any_moment(models: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    data = preferences.write(tmp_path / "data", preferences.rows(45))
    out = {name: tmp_path / name / "model" for name in ("whole", "killed")}

    def command(name: str) -> list[str]:
        run = [sys.executable, "sppo/run_sppo.py", *preferences.SMALL, "--num_train_epochs=6", "--save_steps=2"]
        return [*run, f"--model={models / 'qwen3'}", f"--dataset={data}", f"--output_dir={out[name]}", *flags]

    tiny.succeed(*command("whole"))
    work = out["killed"].with_name("model.partial")
    (data / "reference").rename(data / "aside")  # so that the reference is computed here too
    rng = random.Random(str(flags))

    def at_random() -> bool:
        """Some steps on and somewhere within one; by steps, because a fast machine ends the run in no time."""
        return lines(work) > before + steps and (time.sleep(rng.random() / 50) or True)

    def saving() -> bool:
        return any(not (c / COMPLETE).exists() for c in work.glob("checkpoint-*")) and lines(work) > before

    moments: list[Callable[[], bool]] = [(work / "identity.json").exists, saving, at_random, at_random]
    for moment in moments if not flags else moments[1:3]:
        before, steps = lines(work), rng.randrange(4)
        tiny.kill_when(tiny.start(*command("killed"), slow=work), moment)
        assert not out["killed"].exists()
    if not flags:
        refused = tiny.run(*command("killed"), ACCELERATE_MIXED_PRECISION="bf16")
        assert refused.returncode == 1
        assert "was computed otherwise: precision float32, now bf16 of torch.float32; go on as" in refused.stderr
    said = tiny.succeed(*command("killed"))
    assert "going on from" in said
    assert_same(out["whole"], out["killed"], "adapter_model.safetensors" if flags else "model.safetensors")
    assert not work.exists()
    assert not list(out["killed"].rglob("*.pt"))


def test_with_a_divergence_killed(models: Path, tmp_path: Path) -> None:
    """Started again, the anchor's table is found, and the training is the same to the bit. Another --reg, or another
    weight of it, is refused: half of the model would be of one loss, and half of the other."""
    data = preferences.write(tmp_path / "data", preferences.rows(21))
    anchor = tiny.lora(models / "qwen3", tmp_path / "anchor")

    def command(name: str, weight: float = 0.5) -> list[str]:
        run = ["bash", "scripts/pipeline.sh", *preferences.SMALL, "--num=3", "--save_steps=2", "--gpus=none"]
        run += [f"--model={models / 'qwen3'}", f"--dataset={data}", f"--output_dir={tmp_path / name / 'model'}"]
        return [*run, "--reg=forward", f"--reg_coef={weight}", f"--anchor_model={anchor}"]

    tiny.succeed(*command("whole"))
    work = tmp_path / "killed" / "model.partial"
    tiny.kill_when(tiny.start(*command("killed"), slow=work), lambda: lines(work) >= 3, work.parent)
    refused = tiny.run(*command("killed", 0.1), "--reg=both")
    assert refused.returncode == 1
    for named in ('reg: "forward" there, "both" now', "reg_coef: 0.5 there, 0.1 now"):
        assert named in refused.stdout + refused.stderr
    tiny.succeed(*command("killed"))
    log = "".join(p.read_text() for p in (tmp_path / "killed" / "logs").iterdir())
    assert "found the anchor's log-probs in" in log
    assert "going on from" in log
    assert_same(tmp_path / "whole" / "model", tmp_path / "killed" / "model")
    assert all(line["divergence"] > 0 for line in preferences.metrics(tmp_path / "killed" / "model"))


def test_two_processes_under_zero_3_killed(models: Path, tmp_path: Path) -> None:
    """SIGKILL of the launcher: its ranks go with it, and the next start goes on from the last whole checkpoint.

    Before that it is asked to stop, as a cluster does: it saves at the step that it is in, whatever --save_steps says.
    """
    data = preferences.write(tmp_path / "data", preferences.rows(21))

    def command(name: str) -> list[str]:
        run = ["bash", "scripts/pipeline.sh", *preferences.SMALL, "--num=3", "--save_steps=2", "--gpus=none"]
        run += ["--accelerate_config=cpu_zero3", f"--model={models / 'qwen3'}", f"--dataset={data}"]
        return [*run, f"--output_dir={tmp_path / name / 'model'}"]

    tiny.succeed(*command("whole"))
    work = tmp_path / "killed" / "model.partial"
    stop = tmp_path / "stop"
    words = [*command("killed"), "--save_steps=100", "--overwrite"]  # which does not throw its own work away later
    process = tiny.start(*words, slow=work, SPPO_STOP=str(stop))
    tiny.wait_for(process, lambda: lines(work) >= 2)
    stop.touch()
    assert process.wait(600) == 130
    (saved,) = work.glob("checkpoint-*")
    assert int(saved.name.partition("-")[2]) == lines(work)
    alone = tmp_path / "alone.yaml"
    alone.write_text((tiny.ROOT / "recipes/accelerate_configs/cpu_zero3.yaml").read_text().replace("es: 2", "es: 1"))
    refused = tiny.run(*command("killed"), f"--accelerate_config={alone}")
    assert refused.returncode == 1
    assert "is in 2 parts, one for each process that trained, and now there are 1; go on with 2" in refused.stderr
    refused = tiny.run(*command("killed"), "--accelerate_config=multi_cpu")
    assert refused.returncode == 1
    assert "was written with DeepSpeed, and this training is without it" in refused.stderr
    process = tiny.start(*command("killed"), "--overwrite", slow=work)
    tiny.kill_when(process, lambda: lines(work) >= 5, work.parent)
    tiny.succeed(*command("killed"), "--overwrite")
    logs = "".join(p.read_text() for p in (tmp_path / "killed" / "logs").iterdir())
    assert "2 x 2 x 2 rows a step" in logs
    assert "going on from" in logs
    # of all its starts only the first has a first step
    assert logs.count("at the first step the loss must be near") == 1
    assert_same(tmp_path / "whole" / "model", tmp_path / "killed" / "model")

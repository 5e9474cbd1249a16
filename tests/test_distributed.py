"""Two real processes, by pipeline.sh and each accelerate config that a CPU can run, against one process."""

from __future__ import annotations

import re
from pathlib import Path

import preferences
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

CONFIGS = tiny.ROOT / "recipes" / "accelerate_configs"


def pipeline(models: Path, data: Path, out: Path, config: str, family: str, *flags: str) -> Path:
    command = ["scripts/pipeline.sh", "--model", models / family, "--iter", "1", "--dataset", data, "--num", "1"]
    command += ["--output_dir", out / "model", "--accelerate_config", config, "--gpus", "none"]
    tiny.succeed(*command, *preferences.SMALL, "--num_train_epochs=2", *flags)
    return out / "model"


@pytest.mark.parametrize(
    ("config", "family", "flags"),
    [
        ("multi_cpu", "mistral", ()),
        pytest.param("cpu_zero2", "llama3", ("--gradient_checkpointing=true",), marks=pytest.mark.slow),
        pytest.param(
            "cpu_zero3", "gemma2", ("--gradient_checkpointing=true",), marks=pytest.mark.slow
        ),  # its head is tied to the embedding
        # with an anchor, and merged at the end: networks that are whole
        pytest.param(
            "cpu_zero3",
            "qwen3",
            ("--use_peft", "--loss_type=sppo_all", "--anchor=0.3", "--merge_adapter"),
            marks=pytest.mark.slow,
        ),
        # an adapter that is merged before, and sharded then
        pytest.param("cpu_zero3", "llama3-adapter", (), marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_what_one_does(
    models: Path, tmp_path: Path, config: str, family: str, flags: tuple[str, ...]
) -> None:
    """21 rows in steps of 8: the last step of an epoch has 5, which two ranks with two micro-batches share unevenly.

    Over several steps RMSprop shows clipped gradients, another optimiser in its place, or rows that count twice.
    """
    data = preferences.write(tmp_path / "data", preferences.rows(21))
    if family == "llama3-adapter":
        models = tiny.lora(models / "llama3", tmp_path / family).parent
    if "--anchor=0.3" in flags:
        flags = (*flags, f"--anchor_model={tiny.lora(models / family, tmp_path / 'anchor')}")
    one = pipeline(models, data, tmp_path / "one", "cpu", family, *flags)
    (data / "reference").rename(tmp_path / "reference")  # computed by two processes as well
    two = pipeline(models, data, tmp_path / "two", config, family, *flags)
    log = (tmp_path / "two" / "logs" / "train.1.log").read_text()
    assert "2 x 2 x 2 rows a step" in log
    tables, again = (sorted(d.glob("*.safetensors")) for d in (tmp_path / "reference", data / "reference"))
    assert len(tables) == (2 if "--anchor=0.3" in flags else 1)
    for one_process, two_processes in zip(tables, again, strict=True):
        assert one_process.name == two_processes.name
        left, right = (load_file(table)["logps"] for table in (one_process, two_processes))
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-3)
    first, second = preferences.metrics(one), preferences.metrics(two)
    assert len(first) == len(second) == 6
    (named,) = re.findall(r"at the first step the loss must be near (\S+) ", log)
    assert float(named) == pytest.approx(second[0]["loss"], rel=1e-4)
    assert "warning: at the first step" not in log
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        # at the first two steps (the rate is 0) policy and reference are the same, and accuracy is rounding
        aside = {"tokens_per_second", "seconds_left"} | ({"rewards/accuracies"} if a["step"] <= 2 else set())
        for name in a.keys() - aside:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-4), (a["step"], name)
    weights = ["adapter_model.safetensors", "merged/model.safetensors"] if "--use_peft" in flags else []
    for file in weights or ["model.safetensors"]:
        before, after = load_file(one / file), load_file(two / file)
        assert before.keys() == after.keys()
        for name in before:
            # RMSprop divides by the gradient's size, so that rounding of a gradient near 0 moves a weight
            assert (before[name] - after[name]).abs().mean() < 1e-5, name


@pytest.mark.slow
def test_a_cpu_trains_in_bfloat16_where_the_config_says_so(models: Path, tmp_path: Path) -> None:
    """It was in float32 without a word: such a processor then needs twice as long."""
    data = preferences.write(tmp_path / "data", preferences.rows(4))
    exact, half = (pipeline(models, data, tmp_path / config, config, "llama3") for config in ("cpu", "cpu_bf16"))
    assert len(list((data / "reference").iterdir())) == 2, "the log-probs of one precision stand for the other's"
    first, second = (preferences.metrics(model)[0]["logps/chosen"] for model in (exact, half))
    assert first != second
    assert first == pytest.approx(second, rel=1e-2)
    # the weights stay as exact as the policy's own
    assert load_file(exact / "model.safetensors").keys() == load_file(half / "model.safetensors").keys()
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.float32}


def test_every_config_says_what_it_runs_on() -> None:
    """A CPU can run those that say so; the tests above do, with more than one process."""
    on_cpu = {path.stem for path in CONFIGS.glob("*.yaml") if yaml.safe_load(path.read_text())["use_cpu"]}
    assert on_cpu == {"cpu", "cpu_bf16", "multi_cpu", "cpu_zero2", "cpu_zero3"}


def test_a_config_for_gpus_without_one_is_wrong_use(models: Path, tmp_path: Path) -> None:
    data = preferences.write(tmp_path / "data", preferences.rows(4))
    done = tiny.run(
        "scripts/pipeline.sh", "--model", models / "llama3", "--dataset", data, "--output_dir", tmp_path / "model",
        "--accelerate_config", "zero3", "--gpus", "none",
    )  # fmt: skip
    assert done.returncode == 2
    assert "is for GPUs, and there is none" in done.stderr

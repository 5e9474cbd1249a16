"""The mean of models: a wrong one would be evaluated as the average policy without a word."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from sppo.command.errors import SPPOError
from sppo.models.policy import open_policy
from sppo.training.average import average


def changed(model: Path, target: Path, seed: int) -> Path:
    """A copy with weights of its own."""
    shutil.copytree(model, target)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(target / "model.safetensors")
    moved = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
    save_file(moved, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_every_weight_is_the_mean(models: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = [changed(models / "llama3", run / f"iter{i}" / "model", i) for i in (1, 2, 10)]
    words = ["scripts/average.py", "--run_dir", run, "--base", models / "llama3", "--output_dir", tmp_path / "mean"]
    tiny.succeed(*words)
    weights = [load_file(path / "model.safetensors") for path in (models / "llama3", *made)]
    found = load_file(tmp_path / "mean" / "model.safetensors")
    assert found.keys() == weights[0].keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, sum(w[name] for w in weights) / 4, msg=name)
    assert open_policy(str(tmp_path / "mean")).tokenizer().chat_template  # it is a model like the others
    assert "done" in tiny.succeed(*words)
    changed(models / "llama3", run / "iter11" / "model", 11)
    refused = tiny.run(*words)
    assert refused.returncode == 1
    assert "inputs.models" in refused.stderr


def test_what_has_no_mean_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(SPPOError, match="have other weights: lm_head.weight"):
        average([str(models / "llama3"), str(models / "gemma2")], tmp_path / "mean")
    other = shutil.copytree(models / "llama3", tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(SPPOError, match="another tokenizer or chat template"):
        average([str(models / "llama3"), str(other)], tmp_path / "mean")
    adapter = tiny.lora(models / "llama3", tmp_path / "adapter")
    with pytest.raises(SPPOError, match="is an adapter"):
        average([str(models / "llama3"), str(adapter)], tmp_path / "mean")
    one = tiny.run("scripts/average.py", "--models", models / "llama3", "--output_dir", tmp_path / "mean")
    assert one.returncode == 2
    assert not (tmp_path / "mean").exists()

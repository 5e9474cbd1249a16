"""What a model's directory is and what of it is read; adapters; a training that is asked to stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import preferences
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from sppo import run_sppo
from sppo.common import stopping
from sppo.common.errors import INTERRUPTED, SPPOError, _terminated
from sppo.common.loading import load_causal_lm
from sppo.common.model_files import is_adapter, model_identity, weight_shapes
from sppo.common.policy import open_policy
from sppo.config import Recipe
from sppo.rankers import reward_model
from sppo.training import passes, train
from sppo.training.trainer import SPPOTrainer

IDS = torch.arange(5, 25)[None]  # (1, 20): any tokens


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preferences.write(tmp_path_factory.mktemp("data"), preferences.rows(21))


@pytest.fixture
def both(models: Path, tmp_path: Path) -> Path:
    """A model and an adapter in one directory."""
    shutil.copytree(models / "llama3", tmp_path / "both")
    for path in tiny.lora(models / "llama3", tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(path, tmp_path / "both")
    return tmp_path / "both"


def run_training(model: Path, data: Path, out: Path, *flags: str) -> Path:
    """run_sppo.py's main in this process; the model."""
    run_sppo.main([*preferences.SMALL, f"--model={model}", f"--dataset={data}", f"--output_dir={out}", *flags])
    return out


def logits(model: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_causal_lm(open_policy(str(model)), torch.float32)(input_ids=IDS).logits


# What a directory is


def test_a_model_and_an_adapter_in_one_directory_are_refused_wherever_it_is_named(
    models: Path, dataset: Path, both: Path, tmp_path: Path
) -> None:
    """transformers puts the adapter on the model without a word, and vLLM does not."""
    said = r"holds a model and an adapter's files too \(adapter_config.json, adapter_model.safetensors\).*Move the"
    with pytest.raises(SPPOError, match=said):
        run_training(both, dataset, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    on_it = tmp_path / "on_it"  # as an adapter's base
    shutil.copytree(tmp_path / "adapter", on_it)
    config = json.loads((on_it / "adapter_config.json").read_text())
    (on_it / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(both)}))
    with pytest.raises(SPPOError, match=f"base model {both} {said}"):
        open_policy(str(on_it), weights=False)
    with pytest.raises(SPPOError, match=f"ranker {both} {said}"):
        reward_model.fetch(Recipe(ranker=str(both)))
    for path in both.glob("adapter_*"):  # as the message says
        path.unlink()
    assert logits(both).equal(logits(models / "llama3"))


def test_an_adapter_with_its_bases_config_beside_it_is_an_adapter(models: Path, tmp_path: Path) -> None:
    """As some trainers leave it. It holds no model's weights, so it is clear what is meant."""
    adapter = tiny.lora(models / "llama3", tmp_path / "adapter")
    alone = logits(adapter)
    shutil.copy(models / "llama3" / "config.json", adapter)
    assert open_policy(str(adapter)).weights == models / "llama3"
    assert logits(adapter).equal(alone)
    assert (alone - logits(models / "llama3")).abs().max() > 0.1


def rename(old: str, new: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / old).rename(directory / new)


def write_index(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory / "other.safetensors")
    index = {"weight_map": dict.fromkeys(weight_shapes(directory), "other.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def other_kind(directory: Path) -> None:
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("model", rename("model.safetensors", "unrelated.safetensors"), "no model.safetensors in it .pickled weights"),
        ("adapter", rename("adapter_model.safetensors", "unrelated.safetensors"), "no adapter_model.safetensors in it"),
        ("model", write_index, "transformers reads the first, vLLM the others"),
        ("adapter", other_kind, "is of the kind IA3, and only LoRA is read"),
    ],
    ids=["pickled model", "pickled adapter", "two sets of weights", "another kind of adapter"],
)
def test_what_would_be_read_otherwise_than_it_is_known_is_refused(
    models: Path, tmp_path: Path, kind: str, change: Callable[[Path], Any], said: str
) -> None:
    """Beside any .safetensors, peft would read adapter_model.bin, and a change of it would not be noticed."""
    directory = tmp_path / kind
    if kind == "adapter":
        tiny.lora(models / "llama3", directory)
    else:
        shutil.copytree(models / "llama3", directory)
    change(directory)
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    (directory / "adapter_model.bin" if kind == "adapter" else directory / "unrelated.bin").write_bytes(b"a pickle")
    with pytest.raises(SPPOError, match=said):
        open_policy(str(directory))


def test_an_adapter_on_an_adapter_is_refused(models: Path, tmp_path: Path) -> None:
    tiny.lora(models / "llama3", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    (tmp_path / "two" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "one")})
    )
    with pytest.raises(SPPOError, match="its base model .*one is an adapter too; merge it"):
        open_policy(str(tmp_path / "two"))


def test_a_model_is_known_by_all_weights_that_are_read(models: Path, tmp_path: Path) -> None:
    """Those that its index names, wherever they are; it is a model by its index, too."""
    directory = tmp_path / "model"
    shutil.copytree(models / "llama3", directory)
    weights = load_file(directory / "model.safetensors")
    (directory / "parts").mkdir()
    (directory / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "parts/one.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(weights, directory / "parts" / "one.safetensors", {"format": "pt"})
    assert not is_adapter(directory)
    assert logits(directory).equal(logits(models / "llama3"))
    before = model_identity(directory)
    save_file({k: w + 1 for k, w in weights.items()}, directory / "parts" / "one.safetensors", {"format": "pt"})
    assert model_identity(directory) != before


# A request to stop


@pytest.fixture
def stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that asks to stop. SIGTERM is taken as by run_main, and leave() ends the command and not the tests."""
    monkeypatch.setenv(stopping.VARIABLE, str(tmp_path / "stop"))

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(train, "leave", leave)
    before = signal.signal(signal.SIGTERM, _terminated)
    yield tmp_path / "stop"
    signal.signal(signal.SIGTERM, before)


def test_a_pass_that_is_stopped_or_killed_is_gone_on_with(
    models: Path, dataset: Path, tmp_path: Path, stop: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The reference's pass is killed and then stopped, the anchor's is stopped: tables, losses and weights come out as
    from a training that nobody disturbed, to the bit, and what was kept is not computed again."""
    anchor = f"--anchor_model={tiny.lora(models / 'llama3', tmp_path / 'anchor')}"
    own, after = SPPOTrainer.logps, SimpleNamespace(calls=0, moment=-1, what=stop.touch)

    def counted(self: SPPOTrainer, *args: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():  # else it is a step
            after.calls += 1
            if after.calls == after.moment:
                after.what()
        return own(self, *args)

    monkeypatch.setattr(SPPOTrainer, "logps", counted)
    monkeypatch.setattr(passes, "_KEPT_EVERY", 2)

    def start(name: str, moment: int = -1, what: Callable[[], Any] = stop.touch) -> int:
        """How many batches went through a network without a gradient; two of them compare lean and plain log-probs."""
        data = tmp_path / f"data-{name}"
        shutil.copytree(dataset, data, ignore=shutil.ignore_patterns("reference"), dirs_exist_ok=True)
        after.calls, after.moment, after.what = 0, moment, what
        stop.unlink(missing_ok=True)
        run_training(models / "llama3", data, tmp_path / name, "--anchor=0.3", anchor)
        return after.calls

    def killed() -> None:
        raise RuntimeError("killed")

    whole = start("whole")
    with pytest.raises(RuntimeError, match="killed"):
        start("cut", 2 + 6, killed)  # in the sixth batch of the reference: four are kept
    with pytest.raises(SystemExit) as ended:
        start("cut", 2 + 3)  # in the third of those that were missing, which is the seventh
    assert ended.value.code == INTERRUPTED
    tables = list((tmp_path / "data-cut" / "reference").iterdir())
    assert len(tables) == 1  # a part of one
    assert 0 < int(load_file(tables[0])["logps"].isnan().sum()) < 42
    each = (whole - 2) // 2  # batches of one pass
    with pytest.raises(SystemExit):
        start("cut", 2 + each - 7 + 3)  # in the third of the anchor's
    assert after.calls == 2 + each - 7 + 3
    assert start("cut") == 2 + each - 3
    assert "stopped, as asked; the log-probs that were computed are kept" in capsys.readouterr().out

    names = sorted(path.name for path in (tmp_path / "data-whole" / "reference").iterdir())
    assert len(names) == 2
    assert names == sorted(path.name for path in (tmp_path / "data-cut" / "reference").iterdir())
    for name in names:
        one, other = (load_file(tmp_path / f"data-{run}" / "reference" / name)["logps"] for run in ("whole", "cut"))
        assert one.equal(other)
    times = ("tokens_per_second", "seconds_left")
    lines = [
        [{k: v for k, v in line.items() if k not in times} for line in preferences.metrics(tmp_path / run)]
        for run in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    before, now = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert all(before[name].equal(now[name]) for name in before)


def test_a_request_to_stop_is_heard_while_a_network_is_loaded(
    models: Path, dataset: Path, tmp_path: Path, stop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a large model takes minutes. Nothing of it can be kept, so it ends at once."""

    def slow(*_: Any) -> None:
        stop.touch()
        for _second in range(200):
            time.sleep(0.1)
        pytest.fail("it was not heard")

    monkeypatch.setattr(train, "load_causal_lm", slow)
    with pytest.raises(KeyboardInterrupt):
        run_training(models / "qwen3", dataset, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), stopping.heard():  # asked before
        pytest.fail("it was not heard")
    stop.unlink()
    with stopping.heard():
        pass
    stop.touch()
    time.sleep(1.2)  # nothing comes once it is over
    assert os.environ[stopping.VARIABLE] == str(stop)

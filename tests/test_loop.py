"""The drivers from end to end: 37 awkward prompts, two iterations, both engines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from safetensors.torch import load_file

from sppo.models.files import model_identity
from sppo.store.files import read_json

SYSTEM = {"role": "system", "content": "Answer in one word."}


def awkward_prompts() -> list[Any]:
    """37: some with the word None, two identical, one with a system message, one with three turns, four unusable."""
    prompts: list[Any] = [f"What does `return None` do in case {i}?" for i in range(8)]
    prompts += [f"Name {i} rivers" + " of Europe" * (i % 6) for i in range(20)]
    prompts += [
        "Twice the same.",
        "Twice the same.",
        "emoji 🙂 and עברית",
        "[INST] </s> <|eot_id|> [SEP] <|candidate1|>",
    ]
    prompts.append([SYSTEM, {"role": "user", "content": "Is None true?"}])
    turns = ["What is None?", "A value.", "Of which type?"]
    prompts.append([{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)])
    prompts += ["", "None " * 600, 7]
    return prompts


WEIRD = 'it\'s a "name"; $(touch pwned) & `touch pwned` ünï'
SECRETS = {"HF_TOKEN": "hf_" + "s" * 34, "OPENAI_API_KEY": "sk-" + "s" * 20, "WANDB_API_KEY": "w" * 40}


def drive(
    models: Path, directory: Path, driver: str, family: str, *flags: str, is_read: bool = True, **env: str
) -> Path:
    """The driver, with names that a careless script would run, and secrets that a careless one would write down."""
    prompts, run = directory / f"{WEIRD}.jsonl", directory / WEIRD
    model = directory / f"{WEIRD} {family}"
    if not prompts.exists():
        tiny.write_jsonl(prompts, [{"prompt": p} for p in awkward_prompts()])
        model.symlink_to(models / family)
    command = [driver, "--model", str(model), "--prompts", str(prompts), "--ranker", str(models / "PairRM")]
    command += ["--recipe", "recipes/sppo/demo.yaml", "--maxlen", "24", "--run_dir", str(run), "--gpus", "none"]
    more = ["--iterations", "2", "--pairs", "3", "--learning_rate", "1e-3", *flags]
    deaf = [] if is_read else ["bash", "-c", 'bash "$@" 2>&1 | true; exit ${PIPESTATUS[0]}', "bash"]
    shown = tiny.succeed(*deaf, *command, *more, **SECRETS, **env)
    assert not list(tiny.ROOT.rglob("pwned"))
    assert not list(directory.rglob("pwned"))
    written = [shown.encode(), *(p.read_bytes() for p in run.rglob("*") if p.is_file())]
    assert not [s for s in SECRETS.values() if any(s.encode() in content for content in written)]
    return run


def check_run(run: Path, first_model: Path) -> None:
    """What must hold of a run of two iterations over awkward_prompts."""
    for i in (1, 2):
        data = run / f"iter{i}" / "data"
        rows = pq.read_table(data / "responses.parquet").to_pylist()
        manifest = read_json(data / "responses.manifest.json")
        ids = [r["prompt_id"] for r in rows] + [s["prompt_id"] for s in manifest["skipped"]]
        assert len(ids) == len(set(ids)) == 37
        assert manifest["counts"]["skipped"] == {"empty": 1, "not text": 1, "too long for the model's context": 1}
        asked = Counter(json.dumps(r["prompt"]) for r in rows)
        assert asked[json.dumps([{"role": "user", "content": "Twice the same."}])] == 2
        assert all(len(r["responses"]) == 3 for r in rows)
        texts = " ".join(m["content"] for r in rows for m in r["prompt"])
        assert texts.count("None") == 8 + 1 + 1  # whole, not cut at the word
        trained_on = {r["prompt_id"] for r in pq.read_table(data / "train.parquet").to_pylist()}
        assert trained_on <= {r["prompt_id"] for r in rows}
        assert read_json(run / f"iter{i}" / "model" / "sppo_manifest.json")["counts"]["rows_from_generated_ids"] == len(
            trained_on
        )
    # iteration 2 generated with, and trained from, what iteration 1 trained
    models = [first_model, run / "iter1" / "model", run / "iter2" / "model"]
    identities = [model_identity(m) for m in models]
    assert len(set(identities)) == 3
    for i in (1, 2):
        shard = read_json(run / f"iter{i}" / "data" / "responses" / "shard-00000.manifest.json")
        trained = read_json(run / f"iter{i}" / "model" / "sppo_manifest.json")
        assert shard["inputs"]["model"] == trained["inputs"]["model"] == identities[i - 1]
    for before, after in zip(models, models[1:], strict=False):
        old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
        assert old.keys() == new.keys()
        unchanged = [name for name in old if old[name].equal(new[name])]
        assert not unchanged, f"training left {unchanged} as they were"
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (before / name).read_bytes() == (after / name).read_bytes()
    assert not list(run.rglob("*.partial"))
    assert not list(run.rglob("*.journal"))
    assert not list(run.rglob("*.bin"))  # no pickle


def mtimes(run: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in run.rglob("*") if p.suffix in (".parquet", ".safetensors")}


def test_the_loop_with_transformers(models: Path, tmp_path: Path, network: dict[str, str]) -> None:
    run = drive(models, tmp_path, "run_sppo_llama-3.sh", "llama3", **network)
    check_run(run, models / "llama3")
    first = (run / "iter1" / "model" / "metrics.jsonl").read_text().splitlines()[0]
    line = json.loads(first)  # at the first step the policy is the reference
    assert line["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert line["beta2_loss"] == pytest.approx(0.1**2 * line["loss"], rel=1e-4)
    before, logs = mtimes(run), sorted(run.rglob("*.log"))
    drive(models, tmp_path, "run_sppo_llama-3.sh", "llama3")  # run again: everything is done
    assert mtimes(run) == before
    assert sorted(run.rglob("*.log")) == logs  # and no stage was started to find that out
    (run / "iter2" / "data" / "ranking" / "shard-00000.parquet").unlink()
    # what is gone is made again, and the same, also where nobody reads what is said
    drive(models, tmp_path, "run_sppo_llama-3.sh", "llama3", is_read=False)
    assert {path for path, time in mtimes(run).items() if before[path] != time} == {
        str(run / "iter2" / "data" / "ranking" / "shard-00000.parquet")
    }
    before = mtimes(run)
    # other settings in the same directory are refused, by name
    done = tiny.run(
        "run_sppo_llama-3.sh", "--model", models / "llama3", "--prompts", tmp_path / f"{WEIRD}.jsonl", "--ranker",
        models / "PairRM", "--recipe", "recipes/sppo/demo.yaml", "--run_dir", run, "--gpus", "none", "--pairs", "4",
    )  # fmt: skip
    assert done.returncode == 1
    assert "settings.pairs: 3 there, 4 now" in done.stderr
    assert mtimes(run) == before


@pytest.mark.slow
def test_the_loop_with_gemma_and_two_shards(models: Path, tmp_path: Path) -> None:
    """Gemma-2 folds the system turn, needs attention with soft caps, and a run in parts sees each prompt once."""
    run = drive(
        models, tmp_path, "run_sppo_gemma-2.sh", "gemma2", "--gpus", "none,none", "--accelerate_config", "cpu",
        "--split_prompts", "--estimator", "released", "--ranker_prompt", "templated",
    )  # fmt: skip
    seen = [r for i in (1, 2) for r in pq.read_table(run / f"iter{i}" / "data" / "responses.parquet").to_pylist()]
    assert len({r["prompt_id"] for r in seen}) == len(seen) == 34
    (folded,) = [r for r in seen if "one word" in r["prompt"][0]["content"]]
    assert folded["prompt"] == [{"role": "user", "content": "Answer in one word.\n\nIs None true?"}]


@pytest.mark.slow
def test_the_loop_with_vllm(models: Path, tmp_path: Path, network: dict[str, str]) -> None:
    pytest.importorskip("vllm")
    run = drive(models, tmp_path, "run_sppo_llama-3.sh", "llama3", "--engine", "vllm", **network)
    check_run(run, models / "llama3")
    settings = read_json(run / "iter2" / "data" / "responses" / "shard-00000.manifest.json")["settings"]
    assert settings["engine"] == "vllm"


def test_a_dry_run_shows_the_commands_and_writes_nothing(models: Path, tmp_path: Path) -> None:
    """The preflight's yes or no is its exit code: here the default model and prompts cannot be had.

    Then its `ready: no` is the last line: behind it, commands of a run that cannot begin hid why.
    """
    done = tiny.run("run_sppo_mistral.sh", "--dry_run", "--run_dir", tmp_path / "run", HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 1
    assert "mistralai/Mistral-7B-Instruct-v0.2: not a directory here, and the Hub does not give it" in done.stdout
    assert "UCLA-AGI/data-mistral-7b-instruct-sppo-iter3" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("ready: no: ")
    assert "scripts/generate.sh" not in done.stdout
    drive(models, tmp_path, "run_sppo_llama-3.sh", "llama3", "--dry_run")
    assert "iter2/model" in tiny.succeed("run_sppo_mistral.sh", "--dry_run", "--skip_preflight")
    assert not (tmp_path / "run").exists()

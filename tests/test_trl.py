"""trl beside us: a user of trl.DPOTrainer trains on our train.parquet as it is, and the benchmark against a script of
vLLM and trl compares the same task."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import datasets
import nltk_data
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import trl
from preferences import rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(tiny.ROOT / "benchmarks"))
import ifeval_smollm2
import peer_smollm2
import trl_smollm2

from examples.demo import biased
from sppo.command.errors import UsageError
from sppo.evaluation.suites import instructions
from sppo.models.policy import open_policy
from sppo.pairing.training_set import compute_prob
from sppo.recipe import Recipe
from sppo.schema import ranking_schema, responses_schema
from sppo.store.files import read_json, write_json
from sppo.store.parquet import write_parquet
from sppo.training.data import load_training_set

# of the benchmark against a script of vLLM and trl
SETTINGS = {
    "pairs": 4, "maxlen": 16, "estimator": "paper", "temperature": 1.0, "top_p": 1.0, "beta": 0.03,
    "learning_rate": 1e-3, "warmup_ratio": 0.0, "global_batch_size": 2, "batch_size": 2,
    "gradient_checkpointing": False, "max_prompt_length": 64, "max_length": 128,
}  # fmt: skip
FILES = {"recipe": "recipe.yaml", "prompts": "prompts.jsonl", "questions": "questions.jsonl"}
LOSSES = [f"trl-{loss}" for loss in trl_smollm2.LOSSES]


def our_data(directory: Path) -> Path:
    """train.parquet as compute_prob.py writes it, of 8 prompts with 3 responses each."""
    made = [
        {"prompt_id": str(i), "prompt": row["prompt"], "responses": row["responses"]} for i, row in enumerate(rows(8))
    ]
    write_parquet(directory / "responses.parquet", responses_schema(), made)
    rng = np.random.default_rng(0)
    logits = [(rng.normal(size=(3, 3)) * (1 - np.eye(3))).tolist() for _ in made]
    ranked = [
        {"prompt_id": row["prompt_id"], "logits": c, "scores": [0.0] * 3} for row, c in zip(made, logits, strict=True)
    ]
    write_parquet(directory / "ranking" / "shard-00000.parquet", ranking_schema(), ranked)
    compute_prob(Recipe(pairs=3), directory, False)
    return directory / "train.parquet"


def trainer(model: Path, data: datasets.Dataset, out: Path) -> trl.DPOTrainer:
    settings = trl.DPOConfig(
        output_dir=str(out), loss_type=["sppo_hard"], beta=0.1, learning_rate=1e-3, per_device_train_batch_size=2,
        num_train_epochs=1, gradient_checkpointing=False, bf16=False, use_cpu=True, save_strategy="no",
        logging_steps=1, report_to="none",
    )  # fmt: skip
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    return trl.DPOTrainer(network, args=settings, train_dataset=data, processing_class=tokenizer)


def test_trl_trains_on_our_train_parquet(models: Path, tmp_path: Path) -> None:
    """The two columns that DPOTrainer wants, straight from the file; it finds the prompt that they share.

    With the column `prompt` beside them it would put the prompt in front of whole conversations, so twice.
    """
    path, model = our_data(tmp_path / "data"), models / "llama3"
    data = datasets.load_dataset(
        "parquet",
        data_files=str(path),
        split="train",
        columns=["chosen", "rejected"],
        cache_dir=str(tmp_path / "cache"),
    )
    theirs = trainer(model, data, tmp_path / "out")
    policy = open_policy(str(model))
    tokenizer = policy.tokenizer()
    ours = load_training_set(path, tokenizer, policy.stop_ids(tokenizer), Recipe())
    for row, prompts, responses in zip(theirs.train_dataset, ours.prompts, ours.responses, strict=True):
        for side, prompt, response in zip(("chosen", "rejected"), prompts, responses, strict=True):
            assert row["prompt_ids"] == prompt.tolist()
            assert row[f"{side}_ids"] == response.tolist()
    before = {name: p.detach().clone() for name, p in theirs.model.named_parameters()}
    theirs.train()
    losses = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    assert len(losses) == 4, json.dumps(losses)
    unchanged = [name for name, p in theirs.model.named_parameters() if p.equal(before[name])]
    assert not unchanged


def write_figures(work: Path, name: str, strict: list[bool]) -> None:
    """IFEval's figures of a model, as a benchmark that was stopped behind it has them: of two prompts."""
    directory = work / "ifeval" / name / "suites" / "ifeval"
    directory.mkdir(parents=True)
    tiny.write_jsonl(directory / "checked.jsonl", [{"strict": [one]} for one in strict])
    figures = instructions.figures_of([instructions.Followed([one], [one], 0) for one in strict])
    write_json(directory / "figures.json", {"figures": figures})


@pytest.mark.slow
def test_the_peer_of_a_run_does_the_same_task_and_both_get_a_row(models: Path, tmp_path: Path) -> None:
    """benchmarks/peer_smollm2.py: else its page would compare two tasks, or time a part twice."""
    for package in ("vllm", "lm_eval"):
        pytest.importorskip(package)
    settings = {**SETTINGS, "engine": "transformers", "ranker": "examples.demo:biased", "ranker_prompt": "text"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Name {n} rivers."} for n in range(2, 6)])
    comma = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    tiny.write_jsonl(tmp_path / "questions.jsonl", [{"prompt": "What does Anna see? " * n, **comma} for n in (30, 90)])
    work, data = tmp_path / "work", str(nltk_data.make(tmp_path / "nltk"))
    for name, strict in {"first": [True, False], "ours": [True, True], "trl-sppo_hard": [False, False]}.items():
        write_figures(work, name, strict)
    command = ["benchmarks/peer_smollm2.py", f"--output_dir={tmp_path}", f"--work_dir={work}"]
    command += [f"--model={models / 'llama3'}", *(f"--{key}={tmp_path / name}" for key, name in FILES.items())]
    tiny.succeed(*command, NLTK_DATA=data)

    # of the same responses both would take the same pairs
    drawn = pq.read_table(work / "ours/iter1/data/train.parquet").to_pylist()
    texts = [[response["text"] for response in row["responses"]] for row in drawn]
    pairs = [trl_smollm2.best_and_worst(biased, row["prompt_id"], each) for row, each in zip(drawn, texts, strict=True)]
    assert pairs == [(row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in drawn]

    page = (tmp_path / "peer-smollm2.md").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    head, first, *made = table
    # of two prompts; the differences of ours are 0 and 100 points, those of sppo_hard -100 and 0
    assert first == ["first model", "50.0 ± 50.0", "50.0 ± 50.0", *[""] * 7]
    assert made[0][:4] == ["this project, `sppo`", "100.0 ± 0.0", "100.0 ± 0.0", "+50.0 ± 50.0"]
    assert made[1][:4] == ["vLLM and trl, `sppo_hard`", "0.0 ± 0.0", "0.0 ± 0.0", "-50.0 ± 50.0"]
    assert made[2][0] == "vLLM and trl, `sigmoid`"
    for row in made:
        found = dict(zip(head, row, strict=True))
        assert int(found["pairs"]) in range(1, 5)
        assert int(found["steps"]) == -(-int(found["pairs"]) // SETTINGS["global_batch_size"])
        # minutes are rounded to 0.1
        assert float(found["minutes in all"]) * 60 + 3.1 > float(found["generation, s"]) + float(found["training, s"])

    before, *after = (
        load_file(directory / "model.safetensors")
        for directory in (models / "llama3", work / "ours/iter1/model", *(work / loss for loss in LOSSES))
    )
    for one in after:
        assert any(not one[name].equal(tensor) for name, tensor in before.items())
    assert any(not after[1][name].equal(tensor) for name, tensor in after[2].items())  # each has its own loss

    # what is timed is timed once, and other work is not taken for this
    times = {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}
    assert len([path for path in times if path.name == "seconds.json"]) == 4
    other = tiny.run(*command, "--seed=43")
    assert (other.returncode, "with another seed" in other.stderr) == (2, True)
    assert tiny.succeed(*command).count("peer_smollm2:") == 0
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.json")} == times
    assert (tmp_path / "peer-smollm2.md").read_text() == page


def test_the_peer_refuses_a_setting_that_it_does_not_do(tmp_path: Path) -> None:
    """The two would do different things, and nothing would say so."""
    others = {"select": "best_random", "ranker": "llm-blender/PairRM", "system_prompt": "Be brief.", "reg": "reverse"}
    for key, value in others.items():
        changed = {**SETTINGS, "ranker": "examples.demo:biased", "reg_coef": 0.1 * (key == "reg"), key: value}
        (tmp_path / "recipe.yaml").write_text(json.dumps(changed))
        with pytest.raises(UsageError, match=f"{key}: "):
            trl_smollm2.read_recipe(tmp_path / "recipe.yaml", 42)


def test_the_peer_refuses_a_model_that_the_two_would_draw_from_in_another_precision(
    models: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(models / "llama3", tmp_path / "half")
    tiny.edit_json(model / "config.json", dtype="bfloat16")
    (tmp_path / "recipe.yaml").write_text(json.dumps({**SETTINGS, "ranker": "examples.demo:biased"}))
    args = argparse.Namespace(work_dir=tmp_path / "work", model=model, dtype="auto", prompts=tmp_path / "none")
    with pytest.raises(UsageError, match="is not stored in float32: .* pass --dtype bfloat16"):
        peer_smollm2.compare(args, trl_smollm2.read_recipe(tmp_path / "recipe.yaml", 42))


def test_ifevals_figures_of_another_precision_or_other_prompts_are_not_mixed(models: Path, tmp_path: Path) -> None:
    questions, store = {"ifeval": str(tmp_path / "prompts.jsonl"), "ifbench": ""}, tmp_path / "ifeval-smollm2.json"
    (tmp_path / "prompts.jsonl").write_text("{}")
    first = ifeval_smollm2.load_store(store, models / "llama3", questions)
    write_json(store, first)
    assert ifeval_smollm2.load_store(store, models / "llama3", questions) == first
    (tmp_path / "prompts.jsonl").write_text("{} ")
    with pytest.raises(UsageError, match="figures of another questions"):
        ifeval_smollm2.load_store(store, models / "llama3", questions)
    write_json(store, {**first, "precision": {"dtype": "another"}})
    with pytest.raises(UsageError, match="figures of another questions and precision"):
        ifeval_smollm2.load_store(store, models / "llama3", questions)


def test_the_pages_have_the_measured_figures() -> None:
    """README.md and docs/results.md show figures of docs/ifeval-smollm2.json, and would keep those of an older one."""
    docs = tiny.ROOT / "docs"
    store = read_json(docs / "ifeval-smollm2.json")
    assert (docs / "ifeval-smollm2.md").read_text(encoding="utf-8") == ifeval_smollm2.page(store)
    table = ifeval_smollm2.means(store)
    assert table.count("\n") == 2 + ifeval_smollm2.ITERATIONS
    for page in (tiny.ROOT / "README.md", docs / "results.md"):
        assert table in page.read_text(encoding="utf-8"), page


def test_the_peer_leaves_out_what_teaches_nothing() -> None:
    assert trl_smollm2.best_and_worst(biased, "", ["one two", "one", "one two three", "four"]) == (
        "one two three",
        "one",
    )
    assert trl_smollm2.best_and_worst(biased, "", ["one two", "three four"]) is None
    assert trl_smollm2.best_and_worst(biased, "", ["one two", " "]) is None

"""The report: what is measured of the answers, by hand, and that a run's table has it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
import torch

from sppo.models.loading import load_causal_lm
from sppo.models.policy import open_policy
from sppo.rankers import pending_chunks
from sppo.store.files import read_json

MEASURE = """
def letters(prompt, answer):
    assert prompt.startswith("What is")
    return {"e": [float(c == "e") for c in answer], "nothing": [], "long": len(answer) > 40}

def wrong(prompt, answer):
    return {"e": "many"}

def taken(prompt, answer):
    return {"cut": 0.0}
"""


def report(models: Path, directory: Path, *flags: str, code: int = 0, **environment: str) -> str:
    """scripts/report.py on a run whose iteration 1 has another tiny model than its base."""
    run = directory / "run"
    if not run.exists():
        shutil.copytree(models / "llama3", run / "iter1" / "model")
        (run / "iter1" / "model" / "sppo_manifest.json").write_text(json.dumps({"loss": 2.0, "beta2_loss": 0.02}))
        tiny.write_jsonl(directory / "held-out.jsonl", [{"prompt": f"What is {i}?"} for i in range(5)])
        (directory / "mine.py").write_text(MEASURE)
    command = [tiny.sys.executable, "scripts/report.py", "--run_dir", run, "--iteration", "1", "--gpus", "none"]
    command += ["--base", models / "mistral", "--eval_prompts", directory / "held-out.jsonl", "--maxlen", "12"]
    command += ["--ranker", models / "PairRM", "--ranker_prompt", "text", "--engine", "transformers"]
    done = tiny.run(*map(str, command), *flags, PYTHONPATH=str(directory), **environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_ranker_s_work_ends_between_two_chunks_where_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparisons of a report are in the driver's own process: nobody else would stop them."""
    monkeypatch.setenv("SPPO_STOP", str(tmp_path / "stop"))
    chunks = pending_chunks([{}] * 3, lambda row: False, 2, lambda: SimpleNamespace(batched=False))
    assert len(next(chunks)[1]) == 2
    (tmp_path / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        next(chunks)


def answers(directory: Path, which: str) -> list[dict[str, Any]]:
    return pq.read_table(directory / "run" / which / "eval" / "responses.parquet").to_pylist()


def test_a_report_measures_both_sides_answers(models: Path, tmp_path: Path) -> None:
    flags = ("--measure", "mine:letters", "--base_perplexity")
    (tmp_path / "stop").touch()  # at a job's time limit: it ends as what may go on
    asked = report(models, tmp_path, *flags, code=130, SPPO_STOP=str(tmp_path / "stop"))
    assert "interrupted: what was finished is kept" in asked
    shown = report(models, tmp_path, *flags)
    (row,) = read_json(tmp_path / "run" / "summary.json")
    for measured, which in ((row, "iter1"), (row["base"], "iter0")):
        responses = [r for a in answers(tmp_path, which) for r in a["responses"]]
        text = "".join(r["text"] for r in responses)
        assert measured["e"] == pytest.approx(text.count("e") / len(text), rel=1e-4)
        assert measured["long"] == pytest.approx(sum(len(r["text"]) > 40 for r in responses) / 10)
        assert measured["mean_tokens"] == pytest.approx(sum(len(r["token_ids"]) for r in responses) / 10)
        assert measured["cut"] == pytest.approx(sum(r["finish_reason"] == "length" for r in responses) / 10)
        assert "nothing" not in measured
        network = load_causal_lm(open_policy(str(models / "mistral")), torch.float32).eval()
        total, tokens = 0.0, 0
        for a in answers(tmp_path, which):
            for r in a["responses"]:
                ids = torch.tensor([a["prompt_token_ids"] + r["token_ids"]])
                labels = ids.clone()
                labels[0, : len(a["prompt_token_ids"])] = -100
                with torch.inference_mode():
                    total += network(input_ids=ids, labels=labels).loss.item() * len(r["token_ids"])
                tokens += len(r["token_ids"])
        assert measured["base_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-3)
    head = next(i for i, line in enumerate(shown.splitlines()) if line.split()[:1] == ["iteration"])
    table = [line.split() for line in shown.splitlines()[head : head + 3]]
    assert table[0][1] == "ranker_win_rate"
    assert {"e", "empty", "repeated", "cut", "base_perplexity"} < set(table[0])
    assert [line[0] for line in table[1:]] == ["0", "1"]
    # again: nothing is drawn or measured anew; another measure measures again, and draws nothing
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.parquet")}
    assert "perplexity under the base" not in report(models, tmp_path, *flags)
    report(models, tmp_path)
    (row,) = read_json(tmp_path / "run" / "summary.json")
    assert not {"e", "base_perplexity"} & set(row)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.parquet")}


def test_a_measure_that_gives_no_numbers_is_an_error_that_says_what_it_should_give(
    models: Path, tmp_path: Path
) -> None:
    assert "the measure mine:wrong failed" in report(models, tmp_path, "--measure", "mine:wrong", code=1)
    taken = report(models, tmp_path, "--measure", "mine:taken", code=1)
    assert "--measure mine:taken: cut is the report's own name" in taken
    assert "--measure mine:absent" in report(models, tmp_path, "--measure", "mine:absent", code=2)

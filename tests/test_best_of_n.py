"""Best of n: the right one wins, and a kill, other GPUs or another setting cost nothing that was paid for."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny

from sppo.store.files import read_json, write_json

PROMPTS, N = 12, 5
RANKER = """
import pathlib, time
slow, asked = pathlib.Path(__file__).with_name("slow"), pathlib.Path(__file__).with_name("asked")

def longer(prompt, a, b):
    if slow.exists():
        time.sleep(0.005)
    with asked.open("a") as out:
        out.write("x\\n")
    return 0.1 * (len(a) - len(b)) + 0.3  # the 0.3 is for what is shown first, and cancels
"""


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranker, prompts and a model; `asked` has a line for each question to the ranker."""
    here = tmp_path_factory.mktemp("best")
    (here / "mine.py").write_text(RANKER)
    tiny.write_jsonl(here / "p.jsonl", [{"prompt": f"Why is {i} None?"} for i in range(PROMPTS)])
    (here / "model").symlink_to(models / "llama3")
    return here


def command(world: Path, out: Path, *flags: str) -> list[str]:
    words = [tiny.sys.executable, "scripts/best_of_n.py", f"--model={world / 'model'}", f"--output_dir={out}"]
    words += [f"--prompts={world / 'p.jsonl'}", f"--n={N}", "--maxlen=12", "--engine=transformers", "--gpus=none"]
    return [*words, "--ranker=mine:longer", *flags]


def asked(world: Path) -> int:
    return len((world / "asked").read_text().splitlines())


@pytest.fixture(scope="module")
def done(world: Path) -> Path:
    """The script's output directory, made by one process."""
    shown = tiny.succeed(*command(world, world / "done"), PYTHONPATH=str(world))
    assert "written" in shown
    return world / "done"


@pytest.fixture
def again(done: Path, tmp_path: Path) -> Path:
    """A copy of it, to do something with."""
    return shutil.copytree(done, tmp_path / "again")


def best_rows(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "best.parquet").to_pylist()


def drawn_texts(out: Path) -> dict[str, list[str]]:
    rows = pq.read_table(out / "responses.parquet").to_pylist()
    return {row["prompt_id"]: [response["text"] for response in row["responses"]] for row in rows}


@pytest.mark.slow
def test_the_longest_response_is_the_best_with_its_win_rate_by_hand(done: Path) -> None:
    texts, best = drawn_texts(done), best_rows(done)
    assert len(best) == PROMPTS
    for row in best:
        lengths = np.array([len(text) for text in texts[row["prompt_id"]]])
        assert row["response"] == texts[row["prompt_id"]][row["index"]]
        assert row["index"] == lengths.argmax()
        # s_i - s_j = 0.2 (n_i - n_j), by the released estimator
        others = np.delete(lengths, row["index"])
        expected = (1 / (1 + np.exp(-0.2 * (lengths.max() - others)))).mean()
        assert row["win_rate"] == pytest.approx(expected)


@pytest.mark.slow
def test_the_jsonl_holds_what_the_parquet_holds(done: Path) -> None:
    assert [json.loads(line) for line in (done / "best.jsonl").read_text().splitlines()] == best_rows(done)


@pytest.mark.slow
def test_alpaca_eval_finds_each_prompt_with_its_best_response(done: Path) -> None:
    entries = read_json(done / "best.alpaca.json")
    assert [entry["instruction"] for entry in entries] == [f"Why is {i} None?" for i in range(PROMPTS)]
    assert [entry["output"] for entry in entries] == [row["response"] for row in best_rows(done)]
    assert {entry["generator"] for entry in entries} == {"llama3-best-of-5"}


@pytest.mark.slow
def test_the_manifest_counts_the_comparisons(done: Path) -> None:
    pairs = [pair for texts in drawn_texts(done).values() for pair in itertools.combinations(texts, 2)]
    counts = read_json(done / "best.manifest.json")["counts"]
    assert counts["comparisons"] == len(pairs) == PROMPTS * 10
    assert counts["comparisons of equal texts"] == sum(a == b for a, b in pairs)
    assert counts["tied comparisons"] == sum(len(a) == len(b) and a != b for a, b in pairs)
    assert counts["responses"] == PROMPTS * N


@pytest.mark.slow
def test_what_is_done_is_not_asked_again(world: Path, done: Path) -> None:
    before = asked(world)
    assert "done" in tiny.succeed(*command(world, done), PYTHONPATH=str(world))
    assert asked(world) == before


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "named"), [("--n=6", "pairs"), ("--estimator=paper", "settings.estimator")])
def test_another_setting_is_refused_before_the_ranker_is_asked(world: Path, done: Path, flag: str, named: str) -> None:
    before = asked(world)
    refused = tiny.run(*command(world, done, flag), PYTHONPATH=str(world))
    assert refused.returncode == 1
    assert named in refused.stderr
    assert asked(world) == before


@pytest.mark.slow
def test_the_best_by_an_older_version_s_knockout_is_refused_by_name(world: Path, again: Path) -> None:
    manifest = read_json(again / "best.manifest.json")
    manifest["settings"]["method"] = "knock-out"
    write_json(again / "best.manifest.json", manifest)
    refused = tiny.run(*command(world, again), PYTHONPATH=str(world))
    assert refused.returncode == 1
    assert "settings.method" in refused.stderr


@pytest.mark.slow
def test_overwrite_by_another_number_of_processes_ranks_all_anew_and_draws_nothing(world: Path, again: Path) -> None:
    before, best, drawn = asked(world), best_rows(again), (again / "responses.parquet").read_bytes()
    tiny.succeed(*command(world, again, "--overwrite", "--gpus=none,none"), PYTHONPATH=str(world))
    assert (again / "responses.parquet").read_bytes() == drawn
    assert best_rows(again) == best
    assert len(list((again / "ranking").glob("shard-*.parquet"))) == 2
    first = asked(world) - before
    assert first > 0
    # and back to one process, whose ranking leaves nothing of the two
    tiny.succeed(*command(world, again, "--overwrite"), PYTHONPATH=str(world))
    assert best_rows(again) == best
    assert len(list((again / "ranking").glob("shard-*.parquet"))) == 1
    assert asked(world) - before == 2 * first


@pytest.mark.slow
def test_killed_while_it_ranks_it_goes_on_to_the_same_end(world: Path, done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out, ignore=shutil.ignore_patterns("ranking", "best.*"))  # drawn, and no more
    whole = asked(world)
    (world / "slow").touch()
    process = tiny.start(*command(world, out), slow=out, log=tmp_path / "log", PYTHONPATH=str(world))
    journal = out / "ranking" / "shard-00000.journal"
    tiny.kill_when(process, lambda: journal.exists() and len(journal.read_bytes().splitlines()) > 3, out)
    (world / "slow").unlink()
    assert not (out / "best.parquet").exists()
    kept, before = len(journal.read_bytes().splitlines()) - 1, asked(world)
    tiny.succeed(*command(world, out), PYTHONPATH=str(world))
    assert asked(world) - before <= (PROMPTS - kept) * N * (N - 1)
    assert asked(world) > whole
    for name in ("best.jsonl", "best.alpaca.json"):
        assert (out / name).read_bytes() == (done / name).read_bytes()


@pytest.mark.parametrize(
    ("flag", "message"), [("--n=1", "at least 2 responses"), ("--knockout", "unknown flag --knockout")]
)
def test_what_cannot_be_asked_for_is_one_line(world: Path, tmp_path: Path, flag: str, message: str) -> None:
    refused = tiny.run(*command(world, tmp_path / "out", flag))
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not (tmp_path / "out").exists()

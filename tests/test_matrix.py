"""The win matrix: its numbers by hand, and what it asks again after a kill, a new iteration or a change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from sppo.command.errors import SPPOError
from sppo.evaluation.match import Match
from sppo.evaluation.matrix import compare, interval, length_controlled, matrix_stage, uniform, von_neumann_winner
from sppo.iterations import is_done
from sppo.recipe import load_recipe
from sppo.schema import responses_schema
from sppo.store.files import read_json

RANKER = """
import pathlib, time
asked, slow = pathlib.Path(__file__).with_name("asked"), pathlib.Path(__file__).with_name("slow")

def longer(prompt, a, b):
    with asked.open("a") as out:
        out.write(f"{prompt}|{a}|{b}\\n")
    if slow.exists():
        time.sleep(0.002)
    return 0.1 * (len(a) - len(b))

def shorter(prompt, a, b):
    return 0.1 * (len(b) - len(a))
"""


def game(*edges: tuple[int, int, float]) -> Any:
    """A win matrix of three models where (i, j, s): i beats j with 1/2 + s."""
    made = np.full((3, 3), 0.5)
    for i, j, stake in edges:
        made[i, j], made[j, i] = 0.5 + stake, 0.5 - stake
    return made


def test_a_circle_is_answered_by_a_mixture() -> None:
    """In a circle with stakes a (0 beats 1), b (1 beats 2), c (2 beats 0) the mixture is b : c : a."""
    mixture, value = von_neumann_winner(game((0, 1, 0.3), (1, 2, 0.3), (2, 0, 0.3)))
    assert mixture == pytest.approx([1 / 3] * 3)
    assert value == pytest.approx(0.5)
    mixture, value = von_neumann_winner(game((0, 1, 0.1), (1, 2, 0.2), (2, 0, 0.4)))
    assert mixture == pytest.approx([2 / 7, 4 / 7, 1 / 7])
    assert value == pytest.approx(0.5)


def test_the_mixture_of_all_models_by_hand() -> None:
    """Of models 0, 1, 2 on two prompts: 1 beats 0 in 0.6 and 0.8, 2 beats 0 in 0.9, 2 beats 1 in 0.5 and 0.3.

    Against 0 the mixture has (0.5 + 0.7 + 0.9) / 3, against 1 (0.3 + 0.5 + 0.4) / 3, against 2 (0.1 + 0.6 + 0.5) / 3.
    """
    rates = {(0, 1): [0.6, 0.8], (0, 2): [0.9, 0.9], (1, 2): [0.5, 0.3]}
    lengths = (np.ones((2, 2)), np.ones((2, 3)))
    matches = {key: Match(np.array(p)[:, None, None] * np.ones((1, 2, 3)), *lengths) for key, p in rates.items()}
    found = uniform(3, matches)
    assert [rate for rate, _, _ in found] == pytest.approx([0.7, 0.4, 0.4], abs=1e-4)
    assert all(low <= rate <= high for rate, low, high in found)
    assert found[2][1] < found[2][2]  # the prompts differ


def test_a_model_that_all_others_beat_is_in_no_mixture() -> None:
    mixture, _ = von_neumann_winner(game((1, 0, 0.1), (2, 0, 0.2), (2, 1, 0.05)))
    assert mixture == pytest.approx([0, 0, 1])


def test_the_interval_is_that_of_prompts_not_of_pairs() -> None:
    """A prompt's pairs agree here, so 16 pairs a prompt tell no more than one."""
    n, p = 400, 0.7
    wins = (np.arange(n) < n * p).astype(float)
    for pairs in (1, 4):
        rate, low, high = interval(np.broadcast_to(wins[:, None, None], (n, pairs, pairs)))
        assert rate == pytest.approx(p)
        width = 2 * 1.96 * np.sqrt(p * (1 - p) / n)
        assert high - low == pytest.approx(width, rel=0.08)
    answered = np.full((n, 2, 2), np.nan)
    answered[:, 0, 0] = wins
    assert interval(answered)[0] == pytest.approx(p)
    with pytest.raises(SPPOError, match="no pair has been answered"):
        interval(np.full((3, 1, 1), np.nan))


def test_a_judge_that_likes_length_alone_says_one_half_at_equal_length() -> None:
    rng = np.random.default_rng(0)
    mine, theirs = rng.integers(40, 120, (300, 3)).astype(float), rng.integers(20, 90, (300, 3)).astype(float)
    apart = mine[:, :, None] - theirs[:, None, :]
    biased = 1 / (1 + np.exp(-2 * np.tanh(apart / apart.std())))
    assert interval(biased)[0] > 0.65
    assert length_controlled(Match(biased, mine, theirs)) == pytest.approx(0.5, abs=0.005)
    # a judge that adds a preference of its own: what stays is that preference
    better = 1 / (1 + np.exp(-1 - 2 * np.tanh(apart / apart.std())))
    assert length_controlled(Match(better, mine, theirs)) == pytest.approx(1 / (1 + np.exp(-1)), abs=0.01)
    same = np.full((4, 2), 7.0)
    assert length_controlled(Match(np.full((4, 2, 2), 0.8), same, same)) == pytest.approx(0.8, abs=0.01)


def test_the_matrix_and_its_transpose_add_up_to_one() -> None:
    rng = np.random.default_rng(1)
    lengths = (np.ones((9, 2)), np.ones((9, 2)))
    matches = {(a, b): Match(rng.random((9, 2, 2)), *lengths) for a in range(3) for b in range(a + 1, 3)}
    made = {name: np.array(table) for name, table in compare(3, matches).items()}
    assert np.allclose(made["win_rates"] + made["win_rates"].T, 1)
    assert np.allclose(made["low"] + made["high"].T, 1)
    assert (made["low"] <= made["win_rates"]).all()
    assert made["win_rates"][2, 0] == pytest.approx(matches[0, 2].probability.mean(), abs=1e-4)


def answers(run: Path, iteration: int, length: int, prompts: int = 6) -> None:
    out = run / f"iter{iteration}" / "eval"
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt_id": f"p{n}",
            "prompt": [{"role": "user", "content": f"q{n}"}],
            "responses": [
                {"text": "x" * (length + k), "token_ids": [1] * (length + k), "finish_reason": "stop"} for k in range(2)
            ],
        }
        for n in range(prompts)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=responses_schema()), out / "responses.parquet")
    (out / "responses.manifest.json").write_text("{}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two iterations whose answers get longer."""
    (tmp_path / "mine.py").write_text(RANKER)
    for iteration, length in enumerate((4, 6, 9)):
        answers(tmp_path / "run", iteration, length)
    return tmp_path / "run"


def command(run: Path, *flags: str) -> list[str]:
    return [tiny.sys.executable, "scripts/win_matrix.py", f"--run_dir={run}", "--ranker=mine:longer", *flags]


def asked(run: Path) -> list[str]:
    return (run.parent / "asked").read_text().splitlines()


def test_each_pair_of_models_is_compared_once(run: Path) -> None:
    shown = tiny.succeed(*command(run), PYTHONPATH=str(run.parent))
    assert "iter2 100.0%" in shown
    found = read_json(run / "matrix.json")
    assert found["models"] == ["iter0", "iter1", "iter2"]
    assert found["mean_tokens"] == [4.5, 6.5, 9.5]
    # by hand: 0.1 a character; two responses each, 0 or 1 longer than the other's
    p = [1 / (1 + np.exp(-0.1 * d)) for d in (2 - 1, 2, 2, 2 + 1)]
    assert found["win_rates"][1][0] == pytest.approx(np.mean(p), abs=1e-4)
    assert found["low"][1][0] == found["high"][1][0]  # every prompt says the same
    assert len(asked(run)) == len(set(asked(run))) == 3 * 6 * 4 * 2
    before = len(asked(run))
    tiny.succeed(*command(run), PYTHONPATH=str(run.parent))
    assert len(asked(run)) == before
    answers(run, 3, 5)
    tiny.succeed(*command(run, "--judge=mine:shorter"), PYTHONPATH=str(run.parent))
    # 5 and 6 letters are also iter0's second and iter1's first: equal texts are not asked
    assert len(asked(run)) == before + (3 * 4 - 2) * 6 * 2
    with_judge = read_json(run / "matrix.json")
    assert with_judge["judge"]["name"] == "mine:shorter"
    rates = np.array(with_judge["win_rates"])
    assert np.allclose(np.array(with_judge["judge"]["win_rates"]), rates.T, atol=2e-4)


def test_a_killed_comparison_goes_on(run: Path) -> None:
    (run.parent / "slow").touch()
    for iteration in range(3):
        answers(run, iteration, 4 + iteration, prompts=400)
    words = command(run)
    process = tiny.start(*words, slow=run, log=run.parent / "log", PYTHONPATH=str(run.parent))
    tiny.kill_when(process, lambda: any(p.stat().st_size > 9000 for p in run.glob("iter1/eval/*.journal")))
    (run.parent / "slow").unlink()
    killed = len(asked(run))
    tiny.succeed(*words, PYTHONPATH=str(run.parent))
    again = len(asked(run)) - killed
    assert again < 3 * 400 * 4 * 2 - 64 * 8
    resumed = (run / "matrix.json").read_bytes()
    tiny.succeed(*words, "--overwrite", PYTHONPATH=str(run.parent))
    assert (run / "matrix.json").read_bytes() == resumed


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda run: answers(run, 1, 8), [], "inputs.second"),
        (lambda run: None, ["--ranker=mine:shorter"], "inputs.ranker"),
        (lambda run: answers(run, 3, 5, prompts=5), [], "different prompts"),
    ],
)
def test_what_changed_is_refused_by_name(run: Path, change: Any, flags: list[str], message: str) -> None:
    tiny.succeed(*command(run), PYTHONPATH=str(run.parent))
    before = (run / "matrix.json").read_bytes()
    change(run)
    refused = tiny.run(*command(run), *flags, PYTHONPATH=str(run.parent))
    assert refused.returncode == 1
    assert message in refused.stderr
    assert (run / "matrix.json").read_bytes() == before


def test_a_lost_comparison_is_made_again_and_lost_answers_are_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver asks whether the matrix is done before it calls the script: what is lost must not end it there."""
    tiny.succeed(*command(run), PYTHONPATH=str(run.parent))
    before, count = (run / "matrix.json").read_bytes(), len(asked(run))
    (run / "iter2/eval/against-iter0-ranker.parquet").unlink()
    monkeypatch.syspath_prepend(str(run.parent))
    recipe = load_recipe(None, {"ranker": "mine:longer"})
    assert not is_done([matrix_stage(recipe, run)] for _ in "1")
    tiny.succeed(*command(run), PYTHONPATH=str(run.parent))
    assert len(asked(run)) == count + 6 * 4 * 2
    assert is_done([matrix_stage(recipe, run)] for _ in "1")
    assert (run / "matrix.json").read_bytes() == before
    (run / "iter1/eval/responses.parquet").unlink()
    refused = tiny.run(*command(run), PYTHONPATH=str(run.parent))
    assert refused.returncode == 1
    assert "iter1/eval/responses.parquet: gone" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_judge_called_ranker_does_not_take_the_rankers_place(run: Path) -> None:
    with open(run.parent / "mine.py", "a", encoding="utf-8") as out:
        out.write("\ndef ranker(prompt, a, b):\n    return len(b) - len(a)\n")
    refused = tiny.run(*command(run, "--judge=mine:ranker"), PYTHONPATH=str(run.parent))
    assert refused.returncode == 2
    assert "the name ranker is the ranker's" in refused.stderr
    assert not (run / "matrix.json").exists()


def test_too_few_models_and_no_run_are_one_line(tmp_path: Path) -> None:
    nowhere = tiny.run(*command(tmp_path / "no"))
    assert "no such directory" in nowhere.stderr
    answers(tmp_path, 0, 3)
    alone = tiny.run(*command(tmp_path))
    assert alone.returncode == 1
    assert "two can be compared" in alone.stderr

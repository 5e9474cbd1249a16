"""Best of n: the right one wins, by both ways of comparing, and a kill or another setting costs nothing."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny

from sppo.evaluation.best import draw_order, knockout_and_full, knockout_winners
from sppo.recipe import Recipe
from sppo.schema import Pair
from sppo.store.files import read_json

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


class Longest:
    """Prefers longer texts; has no answer where one holds a question mark."""

    batched = False

    def __init__(self) -> None:
        self.asked: list[Pair] = []

    def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        for i, (prompt, a, b) in enumerate(pairs):
            self.asked.append((prompt, a, b))
            yield i, float("nan") if "?" in a + b else float(len(a) - len(b))


def test_a_knockout_takes_n_minus_one_comparisons_and_finds_what_beats_all() -> None:
    for n in (2, 3, 7, 16):
        texts, ranker = ["x" * (1 + (5 * i) % n) for i in range(n)], Longest()
        orders = [list(np.random.default_rng(seed).permutation(n)) for seed in range(3)]
        items = [([{"role": "user", "content": "q"}], texts)] * 3
        best = max(range(n), key=lambda i: len(texts[i]))
        lengths = {len(t) for t in texts}
        won = knockout_winners(ranker, items, orders)
        assert [len(texts[c.index]) for c in won] == [len(texts[best])] * 3
        if len(lengths) == n:  # no two alike: every comparison is asked, both ways round
            assert len(ranker.asked) == 3 * (n - 1) * 2


def test_without_an_answer_the_first_in_the_draw_goes_on_and_it_is_counted() -> None:
    ranker = Longest()
    (won,) = knockout_winners(ranker, [([], ["a?", "bbb", "bbb", "c"])], [[0, 1, 2, 3]])
    # 0 meets 1 without an answer, 2 beats 3; then 0 meets 2, again without an answer
    assert (won.index, won.unanswered) == (0, 2)
    (won,) = knockout_winners(Longest(), [([], ["bbb", "bbb"])], [[1, 0]])
    assert (won.index, won.same, won.tied) == (1, 1, 0)
    (won,) = knockout_winners(Longest(), [([], ["bbb", "ccc", "d"])], [[1, 0, 2]])
    assert (won.index, won.same, won.tied) == (1, 0, 1)


def test_a_knockout_of_many_does_not_cost_what_it_saves() -> None:
    """The sample's full comparison is of 16 responses, and each pair of them is asked twice, once in each order."""
    ranker, texts = Longest(), ["x" * (1 + (7 * i) % 41) for i in range(41)]
    row = {"prompt_id": "p", "prompt": [], "responses": [{"text": text} for text in texts]}
    rates = knockout_and_full(Recipe(), ranker, row)
    assert len(ranker.asked) == len(set(map(str, ranker.asked))) == 16 * 15
    assert rates["knock-out"] == rates["full comparison"] > 0.5  # what prefers length does not go round
    assert knockout_and_full(Recipe(), Longest(), {**row, "responses": [{"text": "a?"}, {"text": "b"}]}) == {}


def test_a_knockout_may_miss_the_best_and_the_agreement_says_so() -> None:
    """By hand: 0 beats 2 and 3 clearly and loses to 1 by a hair; 1 loses to 2 and 3; 2 beats 3.

    Where 0 meets 1 first, 0 is out and 2 wins, with a lower mean P than 0's.
    """
    beats = {(0, 2): 2.0, (0, 3): 2.0, (1, 0): 0.2, (2, 1): 2.0, (3, 1): 2.0, (2, 3): 2.0}
    logit = {**beats, **{(b, a): -x for (a, b), x in beats.items()}}

    class Stakes:
        batched = False

        def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
            for i, (_, a, b) in enumerate(pairs):
                yield i, logit[int(a), int(b)]

    unlucky = next(name for name in map(str, range(999)) if {0, 1} == set(draw_order(42, name, 4)[:2]))
    row = {"prompt_id": unlucky, "prompt": [], "responses": [{"text": str(i)} for i in range(4)]}
    rates = knockout_and_full(Recipe(estimator="paper"), Stakes(), row)
    p = {x: 1 / (1 + np.exp(-x)) for x in (2.0, -2.0, -0.2)}
    assert rates["full comparison"] == pytest.approx((2 * p[2.0] + p[-0.2]) / 3)
    assert rates["knock-out"] == pytest.approx((2 * p[2.0] + p[-2.0]) / 3)
    (won,) = knockout_winners(Stakes(), [([], list("0123"))], [draw_order(42, unlucky, 4)])
    assert won.index == 2


@pytest.fixture
def world(models: Path, tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(RANKER)
    tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Why is {i} None?"} for i in range(12)])
    (tmp_path / "model").symlink_to(models / "llama3")
    return tmp_path


def command(world: Path, out: str, *flags: str) -> list[str]:
    words = [
        tiny.sys.executable,
        "scripts/best_of_n.py",
        f"--model={world / 'model'}",
        f"--prompts={world / 'p.jsonl'}",
    ]
    words += [f"--output_dir={world / out}", "--n=5", "--maxlen=12", "--engine=transformers", "--gpus=none"]
    return [*words, "--ranker=mine:longer", *flags]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--knockout",)])
def test_the_best_is_the_best_and_alpaca_eval_can_read_it(world: Path, flags: tuple[str, ...]) -> None:
    shown = tiny.succeed(*command(world, "out", *flags), PYTHONPATH=str(world))
    rows = {row["prompt_id"]: row for row in pq.read_table(world / "out/responses.parquet").to_pylist()}
    best = pq.read_table(world / "out/best.parquet").to_pylist()
    assert len(best) == 12
    for row in best:
        texts = [r["text"] for r in rows[row["prompt_id"]]["responses"]]
        assert row["response"] == texts[row["index"]]
        assert len(row["response"]) == max(map(len, texts))
    assert [json.loads(x)["response"] for x in (world / "out/best.jsonl").read_text().splitlines()] == [
        row["response"] for row in best
    ]
    alpaca = read_json(world / "out/best.alpaca.json")
    assert alpaca[3]["instruction"] == "Why is 3 None?"
    assert alpaca[3]["output"] == best[3]["response"]
    assert alpaca[3]["generator"].endswith("best-of-5")
    counts = read_json(world / "out/best.manifest.json")["counts"]
    if flags:  # what prefers length does not go round, so a knock-out misses nothing
        assert counts["agreement"]["the same best"] == 1.0
        assert counts["comparisons"] == 12 * 4
        assert counts["agreement"]["responses"] == 5
    else:
        assert counts["comparisons"] == 12 * 10
        assert all(0.5 < row["win_rate"] < 1 for row in best)
    assert "written" in shown
    before = len((world / "asked").read_text().splitlines())
    assert "done" in tiny.succeed(*command(world, "out", *flags), PYTHONPATH=str(world))
    assert len((world / "asked").read_text().splitlines()) == before
    refused = tiny.run(*command(world, "out", *flags), "--n=6", PYTHONPATH=str(world))
    assert refused.returncode == 1
    assert "pairs" in refused.stderr
    other = command(world, "out", *(() if flags else ("--knockout",)))
    refused = tiny.run(*other, PYTHONPATH=str(world))
    assert refused.returncode == 1
    assert "settings.method" in refused.stderr
    assert len((world / "asked").read_text().splitlines()) == before  # the ranker is not asked in vain
    drawn = (world / "out/responses.parquet").read_bytes()
    tiny.succeed(*other, "--overwrite", PYTHONPATH=str(world))
    again = pq.read_table(world / "out/best.parquet").to_pylist()
    assert [len(row["response"]) for row in again] == [len(row["response"]) for row in best]  # some are as long
    assert (world / "out/responses.parquet").read_bytes() == drawn


@pytest.mark.slow
def test_a_killed_knockout_goes_on(world: Path) -> None:
    (world / "slow").touch()
    words = command(world, "out", "--knockout")
    process = tiny.start(*words, slow=world / "out", log=world / "log", PYTHONPATH=str(world))
    journal, agreement = (world / "out/knockout" / f"{name}.journal" for name in ("shard-00000", "agreement"))
    tiny.wait_for(process, lambda: journal.exists() and len(journal.read_bytes().splitlines()) > 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (world / "out/best.parquet").exists()
    process = tiny.start(*words, slow=world / "out", log=world / "log2", PYTHONPATH=str(world))
    tiny.wait_for(process, lambda: agreement.exists() and len(agreement.read_bytes().splitlines()) > 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept, asked = len(agreement.read_bytes().splitlines()) - 1, len((world / "asked").read_text().splitlines())
    (world / "slow").unlink()
    tiny.succeed(*words, "--overwrite", PYTHONPATH=str(world))  # which keeps what a killed try has left
    # a sampled prompt takes 5 * 4 questions; the first ones' are paid for, and so are all knock-outs
    assert len((world / "asked").read_text().splitlines()) - asked <= (12 - kept) * 5 * 4
    # over two processes
    tiny.succeed(*command(world, "undisturbed", "--knockout", "--gpus=none,none"), PYTHONPATH=str(world))
    assert list((world / "undisturbed/logs").glob("knock-out-1*"))
    for name in ("best.jsonl", "best.alpaca.json"):
        assert (world / "out" / name).read_bytes() == (world / "undisturbed" / name).read_bytes()


def test_one_response_cannot_be_compared(world: Path) -> None:
    refused = tiny.run(*command(world, "out"), "--n=1")
    assert refused.returncode == 2
    assert "at least 2 responses" in refused.stderr

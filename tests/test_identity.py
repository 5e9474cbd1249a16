"""What a result was made from: every setting that decides it, every shard of it, and nothing of another run's."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from test_ranking import write_responses

from sppo.common.errors import SPPOError
from sppo.common.files import read_json, write_json
from sppo.common.journal import Journal
from sppo.common.parquet import read_rows
from sppo.common.place import Place
from sppo.common.rankings import ranking_files
from sppo.common.shards import Slice, shard_count
from sppo.config import Recipe
from sppo.evaluation.best import _ranked
from sppo.evaluation.suites.suite import Judge, Order
from sppo.generation.combine import combine
from sppo.generation.shards import generate_shards
from sppo.pairing.training_set import compute_prob
from sppo.ranking.shards import rank_shards

# journals

OURS, OTHERS = ({"inputs": {"model": "m"}, "settings": {"seed": seed}} for seed in (1, 2))


def journal_of(path: Path, items: int) -> bytes:
    journal = Journal(path, OURS)
    for i in range(items):
        journal.add(f"p{i}", {"n": i})
    journal.close()
    return path.read_bytes()


def test_a_journal_of_another_identity_is_refused_by_name_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "j"
    written = journal_of(path, 2)
    with pytest.raises(
        SPPOError, match=r"other inputs or settings:\n  settings\.seed: 1 there, 2 now\n(.|\n)*--overwrite"
    ):
        Journal(path, OTHERS)
    assert path.read_bytes() == written
    mine = Journal(path, OURS)  # the refused one holds no lock
    assert {key: mine.read(key) for key in mine.done} == {"p0": {"n": 0}, "p1": {"n": 1}}
    mine.close()
    dropped = Journal(path, OTHERS, overwrite=True)
    assert not dropped.done
    dropped.add("p0", {"n": 5})
    dropped.close()
    kept = Journal(path, OTHERS, overwrite=True)  # killed, and started again with --overwrite: its own work stays
    assert kept.read("p0") == {"n": 5}
    kept.close()


@pytest.mark.parametrize("damage", ["first line", "first line, and the last cut"])
def test_a_damaged_first_line_keeps_what_fits(tmp_path: Path, damage: str) -> None:
    """It names no identity, so the items tell whose they are. Without a whole item nothing is lost."""
    path = tmp_path / "j"
    content = bytearray(journal_of(path, 2))
    content[0] ^= 1
    path.write_bytes(content[:-3] if "cut" in damage else content)
    with pytest.raises(SPPOError, match="first line is damaged"):
        Journal(path, OTHERS)
    mine = Journal(path, OURS)
    assert list(mine.done) == (["p0"] if "cut" in damage else ["p0", "p1"])
    mine.close()
    path.write_bytes(content[: content.index(b"\n") + 9])  # killed while the first item was written
    other = Journal(path, OTHERS)
    assert not other.done
    other.close()


class Server(BaseHTTPRequestHandler):
    """A judge's server that rates each answer with 5, and fails once it has given `credit` answers."""

    asked: list[dict[str, Any]]
    credit: int

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        body: dict[str, Any] = {"error": {"message": "no credit"}}
        if len(self.asked) <= self.credit:
            message = {"role": "assistant", "content": "Rating: [[5]]"}
            body = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
        data = json.dumps(body).encode()
        self.send_response(200 if "choices" in body else 403)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[tuple[type[Server], str]]:
    made = type("Made", (Server,), {"asked": [], "credit": 3})
    running = ThreadingHTTPServer(("127.0.0.1", 0), made)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield made, f"http://127.0.0.1:{running.server_address[1]}/v1"
    running.shutdown()


def test_another_judge_does_not_drop_what_is_paid_for(tmp_path: Path, server: tuple[type[Server], str]) -> None:
    """MT-Bench, stopped under judge A: B is refused with both names, and A's command asks for the rest alone."""
    said, url = server
    requests = [{"messages": [{"role": "user", "content": f"answer {n}"}], "temperature": 0} for n in range(8)]

    def judged(name: str, overwrite: bool = False) -> list[dict[str, Any]]:
        order = Order("mt_bench", Recipe(), tmp_path, Place(), "", url, name, overwrite)
        judge = Judge(order)
        judge.refuse_another()
        return judge.choices(requests, lambda choice: "[[5]]" in str(choice), "a rating")

    with pytest.raises(SPPOError, match="check OPENAI_API_KEY"):
        judged("A")
    journal = tmp_path / "judgements.journal"
    written, said.credit, before = journal.read_bytes(), 10**6, len(said.asked)
    assert written.count(b"\n") == 1 + 3
    with pytest.raises(
        SPPOError, match=r'judge: "A" there, "B" now(.|\n)*--judge_model(.|\n)*--output_dir(.|\n)*--overwrite'
    ):
        judged("B")
    assert (journal.read_bytes(), len(said.asked)) == (written, before)
    assert len(judged("A")) == 8
    assert len(said.asked) - before == 8 - 3
    assert len(judged("B", overwrite=True)) == 8
    assert [request["model"] for request in said.asked[-8:]] == ["B"] * 8


# shards


def test_shards_share_evenly() -> None:
    """96 prompts in 64 shards were given to 48 of them."""
    sizes = [stop - start for start, stop in (Slice(0, i, 64).bounds(96) for i in range(64))]
    assert sorted(set(sizes)) == [1, 2]
    assert sum(sizes) == 96
    assert [Slice(0, i, 3).bounds(10) for i in range(3)] == [(0, 3), (3, 6), (6, 10)]
    assert [Slice(4, i, 3).bounds(10) for i in range(3)] == [(0, 4), (4, 8), (8, 10)]  # --frac_len, as released


@pytest.fixture
def rankers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def {0}(prompt, a, b):\n    return float(len({1}) - len({2}))\n"
    (tmp_path / "two_rankers.py").write_text(source.format("longest", "a", "b") + source.format("shortest", "b", "a"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "two_rankers", raising=False)


def ranked(data: Path, by: str, count: int, shards: list[int] | None = None, overwrite: bool = False) -> Recipe:
    """Rank some of so many shards with the function `by`."""
    recipe = Recipe(pairs=3, ranker=f"two_rankers:{by}", ranker_backend="function")
    numbers = range(count) if shards is None else shards
    rank_shards(recipe, data, [Slice(0, i, count) for i in numbers], overwrite)
    return recipe


def rows_of(data: Path) -> list[list[int]]:
    return [read_json(path.with_suffix(".manifest.json"))["settings"]["rows"] for path in ranking_files(data)]


def test_what_an_older_version_cut_goes_on_as_it_was_cut(tmp_path: Path, rankers: None) -> None:
    """It gave each shard ceil(N / n) rows, and noted their number alone."""
    data = write_responses(tmp_path / "data", 10, 3)
    write_json(data / "ranking" / "shards.json", {"shards": 3})
    (data / "ranking" / "shard-00001.journal").touch()
    recipe = ranked(data, "longest", 3)
    assert rows_of(data) == [[0, 4], [4, 8], [8, 10]]
    compute_prob(recipe, data, False)
    ranked(data, "longest", 3, overwrite=True)
    assert rows_of(data) == [[0, 3], [3, 6], [6, 10]]


def test_an_overwrite_with_fewer_shards_leaves_none_of_the_old(tmp_path: Path, rankers: None) -> None:
    """Left over, the old ranker's shards chose 6 of 9 best answers."""
    data, fresh = (write_responses(tmp_path / name, 9, 3) for name in ("data", "fresh"))
    ranked(data, "shortest", 3)
    for name in ("notes.txt", "shard-00007.txt"):  # somebody's
        (data / "ranking" / name).touch()
    assert shard_count(data / "ranking", 0, 1) == 3
    assert shard_count(data / "ranking", 0, 1, overwrite=True) == 1
    ranked(data, "longest", 1, overwrite=True)
    names = ["notes.txt", "shard-00000.manifest.json", "shard-00000.parquet", "shard-00007.txt", "shards.json"]
    assert sorted(p.name for p in (data / "ranking").iterdir()) == names
    recipe, rows = ranked(fresh, "longest", 1), list(read_rows(data / "responses.parquet", ["prompt_id", "responses"]))
    best = _ranked(recipe, data, rows)
    assert best == _ranked(recipe, fresh, rows)
    for row in rows:
        lengths = [len(response["text"]) for response in row["responses"]]
        assert lengths[best[row["prompt_id"]].index] == max(lengths)
    for directory in (data, fresh):
        compute_prob(recipe, directory, False)
    assert pq.read_table(data / "train.parquet").equals(pq.read_table(fresh / "train.parquet"))


def test_generation_overwritten_with_fewer_shards_is_a_fresh_run(models: Path, tmp_path: Path) -> None:
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Why {i}?"} for i in range(7)])
    recipe = Recipe(model=str(models / "llama3"), prompts=str(prompts), pairs=2, maxlen=4, engine="transformers")
    data, fresh = tmp_path / "data", tmp_path / "fresh"
    generate_shards(recipe, data, [Slice(0, i, 3) for i in range(3)], (0, 1), 1, False)
    combine(data, 3, 2, False)
    recipe.temperature = 1.5
    generate_shards(recipe, data, [Slice(0, 0)], (0, 1), 1, True)
    generate_shards(recipe, fresh, [Slice(0, 0)], (0, 1), 1, False)
    assert sorted(p.name for p in (data / "responses").iterdir()) == sorted(
        p.name for p in (fresh / "responses").iterdir()
    )
    assert pq.read_table(data / "responses.parquet").equals(pq.read_table(fresh / "responses.parquet"))


def test_shards_of_two_rankers_are_not_joined(tmp_path: Path, rankers: None) -> None:
    data = write_responses(tmp_path / "data", 8, 3)
    recipe = ranked(data, "longest", 2, [0])
    ranked(data, "shortest", 2, [1])
    for join in (lambda: compute_prob(recipe, data, True), lambda: _ranked(recipe, data, [])):
        with pytest.raises(
            SPPOError, match=r"not of one ranker:\n  ranker\.ranker: .*longest\" there, .*shortest\" now"
        ):
            join()
    assert not (data / "train.parquet").exists()


def test_a_shard_that_was_never_ranked_is_no_dropped_prompt(tmp_path: Path, rankers: None) -> None:
    """It was counted as "not ranked: 4", and trained on without."""
    data = write_responses(tmp_path / "data", 12, 3)
    recipe = ranked(data, "longest", 3, [0, 2])
    with pytest.raises(SPPOError, match=r"made in 3 shards, and not ranked are shard-00001\.parquet; run rank.py"):
        compute_prob(recipe, data, False)
    (data / "ranking" / "shards.json").unlink()  # ranked by hand, by an older version
    with pytest.raises(SPPOError, match="rows 4 to 8 of .* were never ranked"):
        compute_prob(recipe, data, False)
    for manifest in (data / "ranking").glob("*.manifest.json"):  # another tool's, which may leave prompts out
        manifest.unlink()
    (data / "ranking" / "shard-00002.parquet").rename(data / "ranking" / "mine.parquet")
    compute_prob(recipe, data, False)
    assert read_json(data / "train.manifest.json")["counts"]["dropped"]["not ranked"] == 4
    write_json(data / "ranking" / "shards.json", {"shards": 1})
    (data / "ranking" / "shard-00000.manifest.json").touch()
    with pytest.raises(SPPOError, match=r"holds mine\.parquet besides the 1 shards of rank.py"):
        compute_prob(recipe, data, True)

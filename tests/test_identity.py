"""What a result was made from: every setting that decides it, every shard of it, and nothing of another run's."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny  # noqa: F401 - its folder is on the path

from sppo.common.errors import SPPOError
from sppo.common.journal import Journal
from sppo.common.place import Place
from sppo.config import Recipe
from sppo.evaluation.suites.suite import Judge, Order

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

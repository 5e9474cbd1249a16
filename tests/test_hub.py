"""Pushing, with the real client against a local server that speaks the Hub's protocol and checks the token."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
from test_data import data_directory

from sppo.config import Recipe
from sppo.pairing import compute_prob

TOKEN = "hf_" + "a" * 34


class Hub(BaseHTTPRequestHandler):
    """create_repo, preupload and commit. `failures` answers 503 that many times first."""

    repos: dict[str, dict]
    failures = 0
    closed = False

    def do_POST(self) -> None:  # noqa: N802 - the base class's name
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = type(self)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if hub.failures > 0:
            hub.failures -= 1
            return self.answer(503, {"error": "busy"})
        if hub.closed:
            return self.answer(403, {"error": "You don't have the rights to create a dataset under this namespace"})
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            hub.repos.setdefault(name, {"visibility": wanted["visibility"], "type": wanted["type"], "files": {}})
            return self.answer(200, {"url": f"http://{self.headers['Host']}/datasets/{name}", "name": name})
        if self.path == "/api/validate-yaml":  # the card's header
            return self.answer(200, {"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        url = f"http://{self.headers['Host']}/datasets/{name}"
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    hub.repos[name]["files"][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            return self.answer(200, {"commitUrl": f"{url}/commit/0", "commitOid": "0" * 40})
        return self.answer(404, {"error": self.path})

    def do_GET(self) -> None:  # noqa: N802
        self.answer(404, {"error": self.path})

    def answer(self, status: int, value: dict) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], dict[str, str]]]:
    """(the server's class, with what it was sent; the environment that points a client at it)"""
    Hub.repos, Hub.failures, Hub.closed = {}, 0, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    yield Hub, {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    out = data_directory(tmp_path / "data", [["a", "b", "c"]] * 6)
    compute_prob(Recipe(pairs=3, test_size=1), out, False)
    return out


def push(data: Path, env: dict[str, str], *flags: str) -> tuple[int, str]:
    command = ["scripts/push_to_hub.py", "--output_dir", str(data), "--org", "me", "--name", "x-iter1", *flags]
    done = tiny.run(*command, **env)
    return done.returncode, done.stdout + done.stderr


def test_both_data_sets_arrive_private_with_a_card(hub: tuple[type[Hub], dict[str, str]], data: Path) -> None:
    server, env = hub
    server.failures = 1  # retried
    code, shown = push(data, env)
    assert code == 0, shown
    assert TOKEN not in shown
    assert set(server.repos) == {"me/data-x-iter1_generated", "me/synthetic_data_x-iter1_score"}
    assert all(r["visibility"] == "private" and r["type"] == "dataset" for r in server.repos.values())
    score = server.repos["me/synthetic_data_x-iter1_score"]["files"]
    for split in ("train", "test"):
        assert score[f"data/{split}-00000-of-00001.parquet"] == (data / f"{split}.parquet").read_bytes()
    files = server.repos["me/data-x-iter1_generated"]["files"]
    table = pq.read_table(io.BytesIO(files["data/train-00000-of-00001.parquet"]))
    assert {"generate_0", "generate_2", "probability", "rm_scores"} <= set(table.column_names)
    assert table.to_pylist()[0]["generate_1"][-1] == {"role": "assistant", "content": "b"}
    for repo in server.repos.values():
        card = repo["files"]["README.md"].decode()
        assert "tags: [sppo" in card
        assert str(data) not in card
        assert TOKEN not in card


def test_public_only_when_asked(hub: tuple[type[Hub], dict[str, str]], data: Path) -> None:
    server, env = hub
    assert push(data, env, "--public")[0] == 0
    assert all(r["visibility"] == "public" for r in server.repos.values())


@pytest.mark.parametrize(
    ("trouble", "message"),
    [("token", "401"), ("closed", "403"), ("name", "letters, digits")],
)
def test_a_refusal_costs_nothing_local(
    hub: tuple[type[Hub], dict[str, str]], data: Path, trouble: str, message: str
) -> None:
    server, env = hub
    before = {p: p.read_bytes() for p in data.rglob("*") if p.is_file()}
    if trouble == "token":
        env = {**env, "HF_TOKEN": "hf_wrong"}
    server.closed = trouble == "closed"
    code, shown = push(data, env, *(["--name", "../x"] if trouble == "name" else []))
    assert code == (2 if trouble == "name" else 1)
    assert message in shown
    assert "Traceback" not in shown
    assert {p: p.read_bytes() for p in data.rglob("*") if p.is_file()} == before

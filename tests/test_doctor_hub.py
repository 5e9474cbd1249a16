"""The preflight and the Hub: who may push, and a model that is looked at without its weights."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
from hub_server import TOKEN
from test_doctor import flags_of

from sppo.preflight import plan


class Hub(BaseHTTPRequestHandler):
    """whoami, and one model's files. `asked`: the paths that were read."""

    me: dict
    model: Path
    asked: list[str]
    sha = "1" * 40

    def do_GET(self) -> None:  # noqa: N802 - the base class's name
        hub, path = type(self), self.path.partition("?")[0]
        hub.asked += [path] * (self.command == "GET")
        if path == "/api/whoami-v2":
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid username or password."})
            return self.answer(200, hub.me)
        if path == "/api/models/me/chat/revision/main":
            return self.answer(200, {"id": "me/chat", "sha": hub.sha, "siblings": []})
        if path == f"/api/models/me/chat/tree/{hub.sha}":
            files = [f for f in sorted(hub.model.iterdir()) if f.is_file()]
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
            return self.answer(200, tree)
        file = hub.model / path.rpartition("/")[2]
        if path.startswith(f"/me/chat/resolve/{hub.sha}/") and file.is_file():
            return self.send(200, file.read_bytes(), {"ETag": f'"{file.name}"', "X-Repo-Commit": hub.sha})
        return self.answer(404, {"error": path})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, value: object) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(models: Path, tmp_path: Path) -> Iterator[tuple[type[Hub], dict[str, str]]]:
    """(the server's class; the environment that points a client at it)"""
    Hub.model, Hub.asked = models / "llama3", []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    env = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    yield Hub, {**env, "HF_HOME": str(tmp_path / "hf")}
    server.shutdown()


ASK_THE_HUB = """
import sys
from sppo import chat, config, loop, preflight as doctor
from sppo.preflight import checks
args, recipe = config.parse(loop.parser(""), sys.argv[1:])
try:
    for finding in checks.check_hub(doctor.open_run(recipe, args)):
        print(finding.level, finding.text)
except checks.SPPOError as error:
    print("no", error)
"""


@pytest.mark.parametrize(
    ("role", "org", "env", "said"),
    [
        ("write", "me", {}, "ok me may push to me"),
        ("write", "team", {}, "ok me may push to team"),
        ("write", "readers", {}, "no me may only read in --org readers"),
        ("write", "others", {}, "no me does not belong to --org others; its own: me, team, readers"),
        ("read", "team", {}, "no the token of me may only read"),
        ("fineGrained", "team", {}, "note the token is fine-grained"),
        (
            "write",
            "me",
            {"HF_TOKEN": "hf_wrong"},
            "no --org me: the Hub does not take the token (HTTP 401); set HF_TOKEN",
        ),
        ("write", "me", {"HF_TOKEN": ""}, "no --org me: pushing needs a token; set HF_TOKEN or run `hf auth login`"),
        ("write", "me", {"HF_HUB_OFFLINE": "1"}, "no --org me: with HF_HUB_OFFLINE=1 nothing is pushed"),
        ("write", "me", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "no --org me: the Hub is out of reach"),
    ],
)
def test_who_may_push(
    hub: tuple[type[Hub], dict[str, str]],
    models: Path,
    tmp_path: Path,
    role: str,
    org: str,
    env: dict[str, str],
    said: str,
) -> None:
    server, environment = hub
    orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
    server.me = {"name": "me", "orgs": orgs, "auth": {"accessToken": {"role": role}}}
    flags = flags_of(models, tmp_path, "--org", org)
    shown = tiny.succeed(sys.executable, "-c", ASK_THE_HUB, *flags, **{**environment, **env})
    assert said in shown
    assert TOKEN not in shown
    assert "hf_wrong" not in shown


def test_a_model_on_the_hub_is_looked_at_without_its_weights(
    hub: tuple[type[Hub], dict[str, str]], models: Path, tmp_path: Path
) -> None:
    server, env = hub
    command = ["scripts/doctor.py", *flags_of(models, tmp_path, "--model=me/chat")]
    shown = tiny.succeed(*command, **env)
    weights = models / "llama3" / "model.safetensors"
    assert f"{plan.size(weights.stat().st_size)} to download" in shown
    assert "0.136 million parameters" in shown  # the file's size over float32's: its header counts as 0.001
    assert "an answer ends with <|eot_id|>" in shown
    assert not [path for path in server.asked if path.endswith(".safetensors")]
    # what is in the cache now is not taken for the model: offline, its weights would never come
    code = "from sppo.models import open_policy; open_policy('me/chat')"
    done = tiny.run(sys.executable, "-c", code, HF_HOME=env["HF_HOME"])
    assert "me/chat: not a directory here, and the Hub does not give it" in done.stderr

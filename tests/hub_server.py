"""A Hub on this machine: the part of its protocol that the real huggingface_hub client speaks for this project.

It checks the token on every request (an upload's address is signed instead, as the Hub's is), remembers every request,
keeps files, commits and tags, and fails where it is told to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tiny
import yaml

TOKEN = "hf_" + "a" * 34
SIGNATURE = "X-Signature=" + "5" * 32
LARGE = (".parquet", ".safetensors")  # what goes through LFS


@dataclass
class Repo:
    kind: str
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class Failure:
    """Requests "METHOD /path" that hold `on` fail `times` times: with a status, or cut off in the middle (drop)."""

    on: str
    times: int = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False


@dataclass
class Hub:
    """What the server knows. `repos`, to push to, are by name, whatever their kind.

    `models`, to read from: name -> {commit: directory}, the last of which is main.
    """

    url: str = ""
    user: str = "somebody"
    role: str = "write"  # the token's
    orgs: dict[str, str] = field(default_factory=lambda: {"me": "write"})  # with the role
    repos: dict[str, Repo] = field(default_factory=dict)
    models: dict[str, dict[str, Path]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by sha256
    requests: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    watch: Callable[[str], object] = str  # called with every request, before its answer

    @property
    def env(self) -> dict[str, str]:
        """The environment that sends a client here."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def failure(self, request: str) -> Failure | None:
        found = next((f for f in self.failures if f.on in request and f.times > 0), None)
        if found:
            found.times -= 1
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        request = f"{self.command} {path}"
        if path == "/api/agent-harnesses":  # the client's own, for its user agent; nothing here, so nothing is cached
            return self.answer({}, 404)
        self.hub.requests.append(request)
        self.hub.watch(request)
        length = int(self.headers.get("Content-Length") or 0)
        failure = self.hub.failure(request)
        if failure and failure.drop:
            self.rfile.read(length // 2)
            self.close_connection = True
            return None
        body = self._body(length)
        if failure:
            return self.answer({"error": f"failing with {failure.status}"}, failure.status, failure.headers)
        if path.startswith("/lfs/"):  # storage elsewhere: no token goes there
            if urlsplit(self.path).query != SIGNATURE or "Authorization" in self.headers:
                return self.answer({"error": "signature"}, 403)
            return self.store(path.rpartition("/")[2], body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        for pattern, method in _ROUTES.items():
            if found := re.fullmatch(pattern, request):
                return method(
                    self, json.loads(body) if body[:1] == b"{" and b"\n" not in body else body, *found.groups()
                )
        return self.answer({"error": f"no such page: {request}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def _body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass

    def repo(self, name: str) -> Repo | None:
        if name not in self.hub.repos:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return self.hub.repos.get(name)

    def whoami(self, _: bytes) -> None:
        orgs = [{"name": org, "roleInOrg": role} for org, role in self.hub.orgs.items()]
        token = {"accessToken": {"role": self.hub.role}}
        self.answer({"type": "user", "name": self.hub.user, "orgs": orgs, "auth": token})

    def create(self, wanted: dict[str, Any]) -> None:
        name, space = f"{wanted['organization']}/{wanted['name']}", wanted["organization"]
        url = {"url": f"{self.hub.url}/{'datasets/' * (wanted['type'] == 'dataset')}{name}"}
        if space != self.hub.user and self.hub.orgs.get(space) not in ("write", "admin", "contributor"):
            return self.answer({"error": f"You don't have the rights to create a {wanted['type']} here"}, 403)
        if name in self.hub.repos:
            return self.answer({"error": "You already created this repo", **url}, 409)
        self.hub.repos[name] = Repo(wanted["type"], wanted["visibility"] == "private")
        return self.answer(url)

    def info(self, _: bytes, name: str, revision: str | None) -> None:
        if name in self.hub.models:
            commit = [*self.hub.models[name]][-1] if revision in (None, "main") else revision
            self.answer({"id": name, "sha": commit, "siblings": []})
        elif repo := self.repo(name):
            siblings = [{"rfilename": path} for path in repo.files]
            self.answer(
                {"id": name, "sha": repo.commits[-1], "private": repo.private, "tags": [], "siblings": siblings}
            )

    def tree(self, _: bytes, name: str, commit: str) -> None:
        files = [f for f in sorted(self.hub.models[name][commit].iterdir()) if f.is_file()]
        self.answer([{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _sha(f)} for f in files])

    def resolve(self, _: bytes, name: str, commit: str, path: str) -> None:
        commit = [*self.hub.models[name]][-1] if commit == "main" else commit
        file = self.hub.models[name][commit] / path
        if file.is_file():
            return self.send(file.read_bytes(), 200, {"ETag": f'"{_sha(file)}"', "X-Repo-Commit": commit})
        return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def validate(self, card: dict[str, str]) -> None:
        """The rules of the Hub that a card of ours could break."""
        head = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card["content"], re.DOTALL)[1])
        wrong = [k for k in head if k not in _HEADER]
        wrong += [k for k, kind in _HEADER.items() if not isinstance(head.get(k, kind()), kind)]
        wrong += [s for s in head.get("size_categories", []) if not re.fullmatch(r"(\d+[KM]?<)?n[<>]\d+[KMBT]", s)]
        errors = [{"message": f'"{k}" is not valid'} for k in wrong]
        self.answer({"errors": errors, "warnings": []}, 400 if wrong else 200)

    def preupload(self, wanted: dict[str, Any], name: str) -> None:
        if repo := self.repo(name):
            files = []
            for file in wanted["files"]:
                large, there = file["path"].endswith(LARGE), repo.files.get(file["path"])
                files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
                if there is not None:  # what the client need not send again
                    blob = b"blob %d\0" % len(there) + there
                    files[-1]["oid"] = (hashlib.sha256(there) if large else hashlib.sha1(blob)).hexdigest()  # noqa: S324
            self.answer({"files": files})

    def batch(self, wanted: dict[str, Any], _: str) -> None:
        objects = []
        for item in wanted["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}?{SIGNATURE}"},
                "verify": {"href": f"{self.hub.url}/verify"},
            }
            objects.append({**item, **({} if item["oid"] in self.hub.objects else {"actions": actions})})
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer({"error": "another content"}, 400)
        self.hub.objects[oid] = body
        return self.answer({})

    def verify(self, item: dict[str, Any]) -> None:
        self.answer({}, 200 if len(self.hub.objects.get(item["oid"], b"")) == item["size"] else 404)

    def commit(self, body: bytes, name: str) -> None:
        if repo := self.repo(name):
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    repo.files[value["path"]] = self.hub.objects[value["oid"]]
                elif item["key"] == "deletedFile":
                    del repo.files[value["path"]]
            repo.commits.append(hashlib.sha1(body + repo.commits[-1].encode()).hexdigest())  # noqa: S324
            self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/x", "commitOid": repo.commits[-1]})

    def refs(self, _: bytes, name: str) -> None:
        if repo := self.repo(name):
            tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": c} for t, c in repo.tags.items()]
            self.answer({"branches": [], "converts": [], "tags": tags})

    def tag(self, wanted: dict[str, Any], name: str, revision: str) -> None:
        if repo := self.repo(name):
            if wanted["tag"] in repo.tags:
                return self.answer({"error": "Tag exists"}, 409)
            if revision not in repo.commits:
                return self.answer({"error": "Revision not found"}, 404)
            repo.tags[wanted["tag"]] = revision
            self.answer({})
        return None

    def untag(self, _: bytes, name: str, tag: str) -> None:
        if repo := self.repo(name):
            self.answer({}, 200 if repo.tags.pop(tag, None) else 404)


def _sha(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()  # noqa: S324 - as git names a blob


_HEADER: dict[str, type] = {
    "tags": list,
    "size_categories": list,
    "task_categories": list,
    "configs": list,
    "pretty_name": str,
    "base_model": str,
    "library_name": str,
}
_NAME = r"([\w.-]+/[\w.-]+)"
_REPO = rf"/api/(?:datasets|models)/{_NAME}"
_ROUTES = {
    "GET /api/whoami-v2": _Handler.whoami,
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": _Handler.validate,
    rf"GET {_REPO}(?:/revision/(\w+))?": _Handler.info,
    rf"GET {_REPO}/tree/(\w+)": _Handler.tree,
    rf"(?:GET|HEAD) /(?:datasets/|spaces/)?{_NAME}/resolve/(\w+)/(.+)": _Handler.resolve,
    f"POST {_REPO}/preupload/main": _Handler.preupload,
    rf"POST (?:/datasets)?/{_NAME}\.git/info/lfs/objects/batch": _Handler.batch,
    "POST /verify": _Handler.verify,
    f"POST {_REPO}/commit/main": _Handler.commit,
    f"GET {_REPO}/refs": _Handler.refs,
    rf"POST {_REPO}/tag/([\w.-]+)": _Handler.tag,
    rf"DELETE {_REPO}/tag/([\w.-]+)": _Handler.untag,
}


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    with tiny.serving(type("Handler", (_Handler,), {"hub": hub})) as address:
        hub.url = address
        yield hub

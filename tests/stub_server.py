"""A small chat server that answers, and fails, as it is told: for what a real one does only when it fails."""

from __future__ import annotations

import json
import select
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any


class Stub(BaseHTTPRequestHandler):
    """Answers with `behave(n)` of the n-th question, from 0: (status, body) or (status, body, seconds to wait before).

    The fixture `stub` has one that has not been asked anything yet, and its address.
    """

    protocol_version = "HTTP/1.1"
    behave: Callable[[int], tuple]
    asked: list[dict[str, Any]]
    paths: list[str]  # that were asked
    models: list[dict[str, Any]] = [{"id": "tiny-judge", "object": "model"}]
    now = peak = left = 0  # under way, at most, given up by whoever asked
    lock = threading.Lock()

    def do_GET(self) -> None:  # noqa: N802 - the base class's name
        self.answer(200, {"object": "list", "data": type(self).models})

    def do_POST(self) -> None:  # noqa: N802
        stub, body = type(self), json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock:
            stub.asked.append(body)
            stub.paths.append(self.path)
            number = len(stub.asked) - 1
            stub.now += 1
            stub.peak = max(stub.peak, stub.now)
        status, value, *wait = stub.behave(number)
        gone = bool(wait) and bool(select.select([self.connection], [], [], wait[0])[0])  # nothing more is ever sent
        with stub.lock:
            stub.now -= 1
            stub.left += gone
        self.answer(status, value)

    def answer(self, status: int, value: Any) -> None:
        content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json" if not isinstance(value, str) else "text/html")
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # whoever asked has gone
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def says(text: str, *tops: dict[str, float]) -> dict[str, Any]:
    """A chat completion; `tops`: the likeliest tokens at each place, the first of them the one that was said."""
    content = [
        {
            "token": next(iter(top)),
            "logprob": next(iter(top.values())),
            "bytes": None,
            "top_logprobs": [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in top.items()],
        }
        for top in tops
    ]
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return {"object": "chat.completion", "choices": [{**choice, "logprobs": {"content": content} if tops else None}]}

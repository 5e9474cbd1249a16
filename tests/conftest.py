"""Tiny models, made once for all tests. No test but test_gpu.py's needs a GPU, none the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny  # noqa: E402
from stub_server import Stub  # noqa: E402

HEAR = """
import os
import sys

LOCAL = {"127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "", "None"}


def hear(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        where = args[1] if event in ("socket.connect", "socket.sendto") else args
        if isinstance(where, tuple) and str(where[0]) not in LOCAL:  # else a socket of this machine's own
            with open(os.environ["SPPO_TEST_NETWORK"], "a") as log:
                log.write(f"{event} {where} by {sys.argv}\\n")


sys.addaudithook(hear)
"""


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test, or a command that it calls in this process, sets for its own children is not there in the next."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment in which every Python process writes down each host that it asks for. There must be none."""
    (tmp_path / "hear").mkdir()
    (tmp_path / "hear" / "sitecustomize.py").write_text(HEAR)
    heard = tmp_path / "heard"
    environment = {"PYTHONPATH": str(tmp_path / "hear"), "SPPO_TEST_NETWORK": str(heard)}
    ask = [
        sys.executable,
        "-c",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))",
    ]
    subprocess.run(ask, env={**os.environ, **environment}, check=False, stderr=subprocess.DEVNULL)
    assert "192.0.2.1" in heard.read_text()  # it hears
    heard.unlink()
    yield environment
    assert not heard.exists(), heard.read_text()


@pytest.fixture(scope="session")
def warm() -> Iterator[str]:
    """What PYTHON is set to for a loop that is about what it makes: each of its commands is then a fork of one process
    that has imported everything. A command of its own takes 10 to 20 seconds for that on a slow machine."""
    code = (
        "import sys, warm_python\nwith warm_python.warm_python() as python: print(python, flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tiny.ROOT / 'benchmarks'}:{tiny.ROOT}", "PYTHONSAFEPATH": "1"}
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin
        assert server.stdout
        yield server.stdout.readline().strip()
        server.stdin.close()


@pytest.fixture
def stub() -> Iterator[tuple[type[Stub], str]]:
    """A chat server, and its address."""
    pytest.importorskip("openai")
    made = type("Made", (Stub,), {"asked": [], "paths": []})
    with tiny.serving(made) as address:
        yield made, f"{address}/v1"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with llama3, mistral, gemma2 and qwen3 models and the golden PairRM (with its base beside it)."""
    root = tmp_path_factory.mktemp("models")
    tiny.llama3(root / "llama3")
    tiny.mistral(root / "mistral")
    tiny.gemma2(root / "gemma2")
    tiny.qwen3(root / "qwen3")
    shutil.copytree(tiny.GOLDEN / "pairrm" / "PairRM", root / "PairRM")
    shutil.copytree(tiny.GOLDEN / "pairrm" / "tiny-deberta", root / "tiny-deberta")
    return root

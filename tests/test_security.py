"""What a model directory, a path, a token or the network can do to whoever runs this: nothing unasked."""

from __future__ import annotations

import ast
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from bad_input import World, call, write

from sppo.command.console import Console, printable
from sppo.command.errors import SPPOError
from sppo.models.loading import load_causal_lm
from sppo.models.policy import open_policy
from sppo.rankers import TRIAL, reward_model
from sppo.rankers._pairrm_network import PairRM
from sppo.rankers.judge import JudgeRanker
from sppo.rankers.llm_blender import load_blender
from sppo.recipe import Recipe
from sppo.training.checkpoints import only_plain_values

PROMPTS = [{"prompt": f"Name {i} rivers"} for i in range(6)]
CODE = """
import os
import pathlib

from transformers import LlamaConfig, LlamaForCausalLM

if "SPPO_TEST_MARK" in os.environ:
    pathlib.Path(os.environ["SPPO_TEST_MARK"]).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(models: Path, tmp_path: Path) -> Path:
    """A Llama whose directory brings its own Python file, which leaves a mark when it runs."""
    directory = shutil.copytree(models / "llama3", tmp_path / "own")
    (directory / "modeling_own.py").write_text(CODE)
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    tiny.edit_json(directory / "config.json", model_type="own_llama", architectures=["OwnModel"], auto_map=own)
    return directory


class RunsCode:
    """A pickle that runs its text as Python, by a function of a package that is installed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.testing._private.utils.runstring, ("raise SystemExit('code has run')", {})


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save({"state": np.random.get_state()}, tmp_path / "rng_state.pth")
    only_plain_values(tmp_path)
    for what in (RunsCode(), torch.hub.load, subprocess.Popen):
        torch.save({"state": what}, tmp_path / "optimizer.pt")
        with pytest.raises(SPPOError, match=r"optimizer.pt names .*, and is not read; delete"):
            only_plain_values(tmp_path)


OWN = """
import os
import pathlib

pathlib.Path(os.environ["SPPO_TEST_MARK"]).touch()
from transformers import DebertaV2Config as Own, DebertaV2Tokenizer as OwnTokenizer
"""


def plant(directory: Path, part: str) -> Path:
    """Give a model's directory a Python file that leaves a mark when it runs, as its config or its tokenizer."""
    (directory / "own.py").write_text(f"{OWN}# {directory}")  # the same text would not be imported twice
    change = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    if part == "tokenizer":
        change = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer"] * 2}}
    tiny.edit_json(directory / ("config.json" if part == "config" else "tokenizer_config.json"), **change)
    return directory


def as_pairrm(world: Path) -> None:
    PairRM(world / "PairRM", "cpu", 4096)


def by_llm_blender(world: Path) -> None:
    load_blender(world / "PairRM", "cpu")


def as_reward_model(world: Path) -> None:
    shutil.copy(world / "PairRM" / "model.safetensors", world / "tiny-deberta")
    reward_model.fetch(Recipe(ranker=str(world / "tiny-deberta")))


@pytest.mark.parametrize("part", ["config", "tokenizer"])
@pytest.mark.parametrize("load", [as_pairrm, by_llm_blender, as_reward_model])
def test_a_rankers_own_code_never_runs(
    load: Callable[[Path], None], part: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a question whether it may appear on the terminal. In a path that llm-blender takes for another model."""
    world, mark = tmp_path / "delphi", tmp_path / "mark"
    for name in ("PairRM", "tiny-deberta"):
        shutil.copytree(models / name, world / name)
    plant(world / "tiny-deberta", part)
    monkeypatch.setenv("SPPO_TEST_MARK", str(mark))
    monkeypatch.setattr("sys.stdin", asked := io.StringIO("y\n" * 4))
    try:
        load(world)  # a tokenizer's code is left alone where transformers has one of its own for the model
    except SPPOError as error:
        assert "code" in str(error) or "no chat template" in str(error)  # noqa: PT017 - either way is right
    assert not mark.exists()
    assert asked.tell() == 0


def test_every_loader_says_whose_code_may_run() -> None:
    """A loader of transformers that is not told asks on the terminal."""
    for path in [p for folder in ("sppo", "scripts") for p in (tiny.ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in ("from_pretrained", "from_config"):
                runs_code = getattr(called.value, "id", "").startswith(("AutoConfig", "AutoModel", "AutoTokenizer"))
                told = "trust_remote_code" in [keyword.arg for keyword in node.keywords]
                assert told or not runs_code, f"{path}, line {node.lineno}"


EVIL = "import os, pathlib\npathlib.Path(os.environ['SPPO_TEST_MARK']).touch()\nraise SystemExit('it ran')\n"


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of a user: files that are called as libraries are, and a ranker of the user's own."""
    directory = tmp_path / "evil"
    directory.mkdir()
    for name in ("yaml", "json", "argparse", "numpy", "torch", "accelerate", "sppo", "sitecustomize"):
        (directory / f"{name}.py").write_text(EVIL)
    (directory / "mine.py").write_text("def longer(prompt, a, b): return len(a) - len(b)\n")
    monkeypatch.setenv("SPPO_TEST_MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("PYTHON", sys.executable)
    for name in ("PYTHONSAFEPATH", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    return directory


def shell(directory: Path, *words: str | Path, **environment: str) -> str:
    """What a command says that ends well in a directory."""
    command = list(map(str, words))
    done = subprocess.run(command, cwd=directory, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("path", "kept"), [("", ""), (":", ""), ("::/nowhere::", ":/nowhere")])
def test_no_file_of_the_current_directory_runs(evil: Path, path: str, kept: str) -> None:
    """With and without empty entries in the user's own PYTHONPATH."""
    for script, flag in (
        ("scripts/generate.sh", "--pairs"),
        ("scripts/pipeline.sh", "--learning_rate"),
        ("run_sppo_mistral.sh", "--learning_rate"),
    ):
        assert flag in shell(evil, "bash", tiny.ROOT / script, "--help", PYTHONPATH=path)
    shown = shell(evil, "bash", "-c", f". {tiny.ROOT}/scripts/env.sh; echo $PYTHONPATH", PYTHONPATH=path)
    assert shown.strip() == f"{tiny.ROOT}{kept}"
    assert not (evil.parent / "mark").exists()


def test_a_ranker_of_the_current_directory_runs_in_children_and_nothing_else_there(evil: Path) -> None:
    """A launch of shards, of Python's own -c and of rank.py."""
    data = World(evil.parent, evil, pytest.MonkeyPatch()).responses()
    launch = [sys.executable, tiny.ROOT / "tests/shards.py", "--gpus=none", f"--logs={evil.parent / 'logs'}", "--"]
    here = {"PYTHONPATH": str(tiny.ROOT)}
    shown = shell(evil, *launch, sys.executable, "-c", "import yaml; print('yaml', yaml.__file__)", **here)
    assert "site-packages" in shown
    rank = [f"--output_dir={data}", "--ranker=mine:longer", "--pairs=2", "--ranker_prompt=text"]
    shell(evil, *launch, sys.executable, tiny.ROOT / "scripts" / "rank.py", *rank, **here)
    assert pq.read_table(data / "ranking" / "shard-00000.parquet")["logits"].to_pylist()[0] == [[0, -1], [1, 0]]
    assert not (evil.parent / "mark").exists()


def test_controls_of_other_peoples_texts_are_shown_by_name(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column's name, an exception's message, the end of a log: nothing of them moves the cursor."""
    assert printable("a\tb\n\x1b[2J\x9b\r\u202e é 目录 🙂") == "a\tb\n\\x1b[2J\\x9b\\r\\u202e é 目录 🙂"
    assert printable("at https://me:secret@host/x?y") == "at https://***@host/x?y"
    monkeypatch.chdir(tiny.ROOT)
    w = World(tmp_path, models, monkeypatch)
    w.file("hostile.py", "def f(*_): raise ValueError('\x1b]0;evil\x07 \u202e')")
    monkeypatch.syspath_prepend(str(tmp_path))
    log = ["tests/shards.py", "--gpus=none", f"--logs={tmp_path / 'logs'}", "--"]
    for command in (
        w.generate(w.file("p.jsonl", '{"\\u001b[2Jevil": "a"}')),
        w.rank(w.responses(), tmp_path, "--ranker=hostile:f"),
        [*log, "bash", "-c", "printf 'error: \\033[2Jevil\\302\\233\\n'; exit 3"],
    ):
        code, said = call(command, {})
        assert code != 0
        assert "evil" in said
        said = said.replace("\rshard 0", "")  # the progress bar
        assert not [c for c in said if c != "\n" and unicodedata.category(c) in ("Cc", "Cf")], ascii(said)


def test_a_progress_bar_moves() -> None:
    shown = io.StringIO()
    console = Console(shown)
    console.write("\r\x1b[Agenerate: 3/4\r")
    assert shown.getvalue() == "\r\x1b[Agenerate: 3/4\\r"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "may loop for ever"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "refuses it: Range too big"),
        ("{{ 1 / 0 }}", "refuses it: division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses it: maximum recursion depth"),
    ],
)
def test_a_template_that_loops_for_ever_ends(
    template: str, said: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sppo.models.chat.TEMPLATE_SECONDS", 0.2)
    monkeypatch.chdir(tiny.ROOT)
    w = World(tmp_path, models, monkeypatch)
    model = w.model(chat_template__jinja=write(template))
    started = time.monotonic()
    code, shown = call(w.of_model(model), {})
    assert (code, said in shown, "Traceback" in shown) == (1, True, False), shown
    assert str(model) in shown or "refuses" in said
    assert time.monotonic() - started < 30
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_judges_redirect_sends_no_prompt_to_another_host(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the key; and the user is told where it leads, without what may be secret in that."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-own")
    seen: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - the base class's name
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Redirects(Elsewhere):
        def do_GET(self) -> None:  # noqa: N802
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Location", f"{other.replace('://', '://me:secret@')}{self.path}?key=secret")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET  # noqa: N815

    with tiny.serving(Elsewhere) as other, tiny.serving(Redirects) as first:
        judge = JudgeRanker(Recipe(ranker="j", ranker_url=f"{first}/v1"))
        for ask in (lambda: judge.server.check_serves("j"), lambda: list(judge.logits([TRIAL]))):
            with pytest.raises(SPPOError, match=f"HTTP {status} and points to {other}/v1/") as refusal:
                ask()
            assert "secret" not in str(refusal.value)
    assert not seen


def test_no_script_hides_a_library(tmp_path: Path) -> None:
    """`import doctor` in a user's module is not scripts/doctor.py, nor `import plan` sppo/plan.py."""
    (tmp_path / "mine.py").write_text(
        "import importlib.util\nprint(*map(importlib.util.find_spec, ('doctor', 'plan')))"
    )
    for folder in ("scripts", "sppo"):
        probe = f"import sys; sys.path.insert(0, {str(tiny.ROOT / folder)!r}); import sppo, mine"
        path = f"{tiny.ROOT}:{tmp_path}"
        assert shell(tmp_path, sys.executable, "-Pc", probe, PYTHONPATH=path).strip() == "None None"


def test_a_models_own_code_runs_only_when_asked(own_code: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    environment = {"SPPO_TEST_MARK": str(mark), "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(tiny.ROOT / "tests")}
    run = ["run_sppo_llama-3.sh", "--model", own_code, "--prompts", prompts, "--ranker=tiny:longer"]
    run += ["--recipe", "recipes/sppo/demo.yaml", "--maxlen=12", "--pairs=2", "--run_dir", tmp_path / "run"]
    run += ["--gpus=none", "--engine=transformers", "--iterations=1"]
    refused = tiny.run(*run, **environment)
    assert refused.returncode == 1
    assert "--trust_remote_code" in refused.stderr + refused.stdout
    assert not mark.exists()
    tiny.succeed(*run, "--trust_remote_code", **environment)
    assert mark.exists()
    saved = str(tmp_path / "run" / "iter1" / "model")  # what iteration 2 would start from
    assert type(load_causal_lm(open_policy(saved, remote_code=True), torch.float32)).__name__ == "OwnModel"
    with pytest.raises(SPPOError, match="--trust_remote_code"):
        load_causal_lm(open_policy(saved), torch.float32)

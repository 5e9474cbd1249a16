"""How commands behave towards the shell, the file system and what a user hands to them: flags, functions, output."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from bad_input import World, call, edit

from sppo import cli, plan
from sppo.command.console import Console
from sppo.command.errors import NO_OVERWRITE, SPPOError, UsageError
from sppo.command.values import refuse_secrets
from sppo.evaluation.measures import ask
from sppo.evaluation.suites.alpaca_eval import completions, has_letter
from sppo.plan import driver_parser
from sppo.rankers.function import load_function
from sppo.recipe import KEYS


@pytest.fixture
def world(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tiny.ROOT)
    return World(tmp_path, models, monkeypatch)


def bash(line: str, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    """A line of bash with `words` behind its "$@", and the code of a pipe's first command."""
    command = ["bash", "-c", f"set -o pipefail; {line}", "bash", sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=tiny.ROOT, check=False, **more)


GONE = ['"$@" | true', '"$@" >&-', '"$@" > /dev/full', '"$@" >&- 2>&- <&-', '"$@" 2>&1 | true']


@pytest.mark.parametrize("line", GONE)
def test_work_is_done_although_nobody_reads_what_is_said(world: World, line: str) -> None:
    """A pipe whose reader has gone, a closed stdout, a full disk: the end is the same and so is the exit code.

    The ranker writes to file 1 past Python, which would be a file of ours where stdout is closed.
    """
    data = world.responses()
    world.file("noisy.py", "import os\ndef f(_, a, b): return os.write(1, b'noise' * 20000) * 0 + len(a) - len(b)\n")
    line = f"PYTHONPATH={world.d} {line}"
    for command in (world.rank(data, world.d, "--ranker=noisy:f"), world.pair(data)):
        done = bash(line, *command)
        assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr
    found = pq.read_table(data / "ranking" / "shard-00000.parquet")["logits"].to_pylist()
    assert found[0] == [[0, -1], [1, 0]]
    assert pq.read_table(data / "train.parquet").num_rows == 2


def test_a_failure_keeps_its_code_although_nobody_reads_what_is_said(world: World) -> None:
    for line in GONE:
        assert bash(line, *world.pair(world.d, "--nonsense")).returncode == 2
        assert bash(line, *world.pair(world.d)).returncode == 1


def test_a_home_directory_is_one_in_every_flag_and_recipe(world: World) -> None:
    """A shell leaves the `~` of `--output_dir=~/x` as it is, and a directory called `~` would be made."""
    world.patch.setenv("HOME", str(world.d))
    world.good()
    recipe = world.file("r.yaml", "prompts: ~/p.jsonl\n")
    command = [word for word in world.generate("") if not word.startswith(("--prompts", "--output_dir"))]
    code, said = call([*command, f"--recipe=~/{recipe.name}", "--output_dir=~/out"], {})
    assert code == 0, said
    assert pq.read_table(world.d / "out" / "responses.parquet").num_rows == 2
    assert not (tiny.ROOT / "~").exists()
    driver = driver_parser("").parse_args(["--run_dir=~/run", "--model=~/m", "--system_prompt=~/is text"])
    assert (driver.run_dir, driver.model, driver.system_prompt) == (f"{world.d}/run", f"{world.d}/m", "~/is text")
    parser = cli.chain_parser("", KEYS["train"], "model_dir")
    made = parser.parse_args(["--dataset=~/d", "--output_dir=~no-such-user/o", "--logs=~/l"])
    assert (made.dataset, made.model_dir, made.logs) == (f"{world.d}/d", "~no-such-user/o", world.d / "l")


def test_a_console_is_a_stream_with_all_that_streams_have() -> None:
    """`with sys.stdout` was a TypeError, and what writelines was given came as it was; colours came as \\x1b[31m."""
    kept = io.StringIO()
    kept.close = lambda: None
    with Console(kept) as console:
        console.writelines(["a\x1b]0;title\x07\n", "https://me:pw@host\n"])
        console.write("\x1b[1;31mred\x1b[0m \x1b[2J\n")
    said = "a\\x1b]0;title\\x07\nhttps://***@host\n\x1b[1;31mred\x1b[0m \\x1b[2J\n"
    assert kept.getvalue() == said


NO_SECRETS = [
    "mistral-sk-7b-instruct-v0.2-SPPO-Iter3-and-a-long-name-behind-it",
    "/runs/sk-llama3-8b-Instruct-SPPO-Iter3-with-all-prompts-1234567890/model",
    "sk-llama3-8b-Instruct-SPPO-Iter3-with-all-prompts-and-more",
    "sk-Llama3Instruct8BSPPOIter3/of-somebody-whose-name-is-long-1",
    "ray://user@head:10001",
    "ssh://git@github.com/a/b",
]
SECRETS = [
    "sk-" + "aB1" * 16,
    "K=sk-proj-" + "aB1_" * 8 + "x" * 20,
    "hf_" + "a" * 34,
    "https://user:pw@host/v1",
    "https://:pw@host",
]


@pytest.mark.parametrize(("words", "is_secret"), [(NO_SECRETS, False), (SECRETS, True)])
def test_a_name_with_sk_in_it_is_no_key(words: list[str], is_secret: bool) -> None:
    for word in words:
        with pytest.raises(UsageError, match="a password or a token") if is_secret else nullcontext():
            refuse_secrets("--model", word)


class Answers:
    """A judge whose answers are known; completions() wants no more of it."""

    def __init__(self, known: list[dict[str, Any]]) -> None:
        self.known = known

    def choices(self, *_: object) -> list[dict[str, Any]]:
        return self.known


@pytest.mark.slow
def test_a_suite_takes_no_judgement_from_broken_log_probs() -> None:
    pytest.importorskip("alpaca_eval")
    for of_m, is_judgement in (
        (-0.1, True),
        (float("nan"), False),
        (float("-inf"), False),
        (None, False),
        (0.9, False),
    ):
        tops = [{"token": "m", "logprob": of_m}, {"token": "M", "logprob": -2.4}]
        choice = {"logprobs": {"content": [{"token": "m", "top_logprobs": tops}]}}
        assert has_letter(choice) == is_judgement, of_m
        kept = completions(Answers([choice]))(["<|im_start|>user\nq\n<|im_end|>"], "judge")["completions_all"]
        assert kept == [choice if is_judgement else {}]


EXITS = """
import sys
def ranks(*_): sys.exit(0)
def quits(*_): quit()
class Number:
    def __float__(self): raise SystemExit
def counts(*_): return Number()
def measures(*_): return {"one": Number()}
"""


def test_a_function_that_exits_is_an_error_that_names_it(world: World) -> None:
    """sys.exit(0) would end the command with work undone and an exit code that says done."""
    data = world.responses()
    world.file("exits.py", EXITS)
    world.file("exits_at_once.py", "import sys\nsys.exit(0)\n")
    world.patch.syspath_prepend(str(world.d))
    for name, code, message in (
        ("exits:ranks", 1, "the ranker's function exits:ranks failed: SystemExit: 0"),
        ("exits:quits", 1, "the ranker's function exits:quits failed: SystemExit"),
        ("exits:counts", 1, "the ranker's function exits:counts gave <exits.Number"),
        ("exits_at_once:f", 2, "can be imported (SystemExit: 0)"),
    ):
        found, said = call(world.rank(data, world.d, f"--ranker={name}"), {})
        assert (found, message in said) == (code, True), said
    assert not list((data / "ranking").glob("*.parquet"))
    with pytest.raises(SPPOError, match=r"the measure exits:measures failed \(SystemExit"):
        ask(load_function("exits:measures", "--measure"), "exits:measures", "prompt", "answer")


def test_a_models_own_code_that_exits_is_an_error(world: World) -> None:
    config = edit(model_type="own", auto_map={"AutoConfig": "own.Own"})
    model = world.model(config__json=config)
    (model / "own.py").write_text(f"import sys\nsys.exit(0)  # {world.d}\n")
    code, said = call(world.of_model(model, "--trust_remote_code"), {})
    assert (code, "cannot be loaded: it calls sys.exit" in said) == (1, True), said


def test_a_command_without_overwrite_does_not_advise_it(world: World) -> None:
    code, said = call(world.generate(world.good()), {})
    assert code == 0, said
    for environment, has_it in (({}, True), ({NO_OVERWRITE: "1"}, False)):
        code, said = call(world.generate(world.good(), "--temperature=0.5"), environment)
        assert (code, "--overwrite" in said, "move away what is named here" in said) == (1, has_it, not has_it), said
    seen: list[str] = []
    world.patch.setattr(plan, "preflight", lambda *_: seen.append(os.environ[NO_OVERWRITE]) or 2)
    assert call(world.loop(), {})[0] == 1
    assert seen == ["1"]


def test_a_report_by_hand_has_the_runs_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With released.yaml's it compared answers that were drawn in another way, and put that into the run's summary."""
    (tmp_path / "iter1").mkdir()
    (tmp_path / "iter1" / "recipe.yaml").write_text(
        "model: first\ntemperature: 0.3\neval_prompts: held.jsonl\nseed: 7\n"
    )
    seen: list[Any] = []
    monkeypatch.setattr("sppo.evaluation.report.report", lambda *asked: seen.append(asked))
    monkeypatch.setattr("sppo.evaluation.page.page.write_page", lambda run: run)
    made = importlib.util.spec_from_file_location("by_hand", tiny.ROOT / "scripts" / "report.py")
    script = importlib.util.module_from_spec(made)
    made.loader.exec_module(script)
    words = ["report.py", f"--run_dir={tmp_path}", "--iteration=2", "--gpus=none"]
    for more in ([], ["--temperature=0.9", "--base=other"]):
        monkeypatch.setattr("sys.argv", [*words, *more])
        script.main()
    found = [(recipe.temperature, recipe.eval_prompts, recipe.seed, base) for recipe, _, _, base, *_ in seen]
    assert found == [(0.3, "held.jsonl", 7, "first"), (0.9, "held.jsonl", 7, "other")]


def test_prompts_that_are_not_there_change_nothing_of_a_run(world: World) -> None:
    """A wrong name on a finished run passed the preflight, since nothing seemed left to do, and rewrote recipe.yaml."""
    world.file("run/.lock", "")
    code, said = call([*world.loop(), "--eval_prompts=nowhere.jsonl"], {})
    assert (code, "--eval_prompts nowhere.jsonl: no such file" in said) == (2, True), said

"""How commands behave towards the shell, the file system and what a user hands to them: flags, functions, output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from bad_input import World, call

from sppo import loop
from sppo.evaluation.suites.alpaca_eval import completions, has_letter
from sppo.launch import chain


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
    driver = loop.parser("").parse_args(["--run_dir=~/run", "--model=~/m", "--system_prompt=~/is text"])
    assert (driver.run_dir, driver.model, driver.system_prompt) == (world.d / "run", f"{world.d}/m", "~/is text")
    made = chain.pipeline_parser().parse_args(["--dataset=~/d", "--output_dir=~no-such-user/o", "--logs=~/l"])
    assert (made.dataset, made.output_dir, made.logs) == (f"{world.d}/d", Path("~no-such-user/o"), world.d / "l")


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

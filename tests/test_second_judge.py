"""--judge takes every backend: what it names, what the ranker's settings leave alone, its files, and the real thing."""

from __future__ import annotations

import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from stub_server import Stub, says
from test_identity import FUNCTION, held_out, rankers
from test_matrix import answers, command
from test_reward_model import make, one_by_one

from sppo.command.errors import SPPOError, UsageError
from sppo.evaluation import report
from sppo.evaluation.match import judges, match, match_stage, shown
from sppo.evaluation.page import figures
from sppo.evaluation.page.gather import IterationRecord, RunRecord
from sppo.launch.devices import CPU
from sppo.preflight.evaluation import check_judge
from sppo.preflight.facts import Machines, Run
from sppo.recipe import Recipe, SecondJudge, load_recipe, second_judge
from sppo.store.files import digest, read_json

__all__ = ["rankers"]  # a fixture
RANKER = "def longer(prompt, a, b):\n    return 0.1 * (len(a) - len(b))\n"
A_SERVER = "http://localhost:8000/v1"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two iterations whose answers get longer, and mine:longer, its ranker."""
    (tmp_path / "mine.py").write_text(RANKER)
    for iteration, length in enumerate((4, 6, 9)):
        answers(tmp_path / "run", iteration, length, prompts=2)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("mine:shorter", ("function", "mine:shorter")),
        ("my.package:Shorter", ("function", "my.package:Shorter")),
        ("function:mine:shorter", ("function", "mine:shorter")),
        ("reward-model:/data/rm", ("reward-model", "/data/rm")),
        ("reward-model:Skywork/Skywork-Reward-V2", ("reward-model", "Skywork/Skywork-Reward-V2")),
        ("pairrm:llm-blender/PairRM", ("pairrm", "llm-blender/PairRM")),
        (f"judge:Qwen/Qwen3-32B@{A_SERVER}", ("judge", "Qwen/Qwen3-32B", A_SERVER)),
        (f"judge:claude@2026@{A_SERVER}", ("judge", "claude@2026", A_SERVER)),
    ],
)
def test_what_judge_names(text: str, named: tuple[str, ...]) -> None:
    assert second_judge(text) == SecondJudge(*named)
    assert load_recipe(None, {"judge": text}).judge == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shorter", "--judge shorter: not backend:ranker .*, nor module:name"),
        ("rewardmodel:a/b", "did you mean reward-model"),
        ("reward_model:rm", "did you mean reward-model"),
        ("judge:Qwen3", "--judge judge:Qwen3: its server is missing; judge:NAME@http://"),
        ("judge:Qwen3@localhost:8000", "--judge judge:Qwen3: its server is missing"),
        (f"judge:@{A_SERVER}", "its server is missing"),
        ("reward-model:", "the model's directory or Hub id is missing behind reward-model:"),
        ("function:mine", "module:name is missing behind function:"),
        ("", None),
    ],
)
def test_a_judge_that_is_misspelt_is_one_line_before_any_work(text: str, said: str | None) -> None:
    if said is None:
        assert judges(load_recipe(None, {"judge": text})).keys() == {"ranker"}
        return
    with pytest.raises(UsageError, match=said) as error:
        load_recipe(None, {"judge": text})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "judge:m@http://me:secret@h/v1",
        "judge:m@http://secret@h/v1",
        "judge:m@http://h/v1?api_key=secret",
        "judge:m@h/v1?api_key=secret",
        "juge:m@http://h/v1?api_key=secret",
    ],
)
def test_no_key_is_in_a_judges_address_nor_in_the_message(text: str) -> None:
    """Recipes and the page show --judge."""
    with pytest.raises(UsageError) as error:
        load_recipe(None, {"judge": text})
    assert "secret" not in str(error.value)


def test_a_users_module_of_a_backends_name_goes_on_as_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begun by older code with --judge judge:likes, from the user's judge.py."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="its server is missing"):
        second_judge("judge:likes")
    (tmp_path / "judge.py").write_text("def likes(prompt, a, b): return 0\n")
    assert second_judge("judge:likes") == SecondJudge("function", "judge:likes")
    assert second_judge(f"judge:likes@{A_SERVER}").backend == "judge"


def test_no_setting_of_the_ranker_leaks_into_the_judge() -> None:
    """The ranker's commit does not exist in the judge's repository; its address would be sent the judge's questions."""
    own: dict[str, Any] = {f.name: f"set-{f.name}" for f in fields(Recipe) if f.name.startswith(("ranker_", "judge_"))}
    recipe = replace(Recipe(), **own, ranker="r", judge=f"judge:m@{A_SERVER}", batch_tokens=7)
    ranker, judge = judges(recipe).values()
    assert ranker is recipe
    assert (judge.ranker, judge.ranker_backend, judge.ranker_url, judge.batch_tokens) == ("m", "judge", A_SERVER, 7)
    kept = {key for key in own if getattr(judge, key) == own[key]}
    assert kept == {"ranker_prompt", "ranker_concurrency", "ranker_timeout", "ranker_retries"}
    usual = Recipe()
    for key in own.keys() - kept - {"ranker_backend", "ranker_url"}:
        assert getattr(judge, key) == getattr(usual, key)


def test_older_codes_files_and_identity_stay(tmp_path: Path, rankers: None) -> None:
    """What --judge module:function had compared is not compared again: names, inputs and settings, written out."""
    run = held_out(tmp_path / "run")
    recipe = Recipe(**FUNCTION, judge="two_rankers:shortest")
    source = digest(Path(__import__("two_rankers").__file__))
    identity = {"backend": "function", "ranker": "two_rankers:shortest", "source": source}
    judge = judges(recipe)["shortest"]
    stage = match_stage(judge, "shortest", run, 0, 1)
    assert stage.outputs == [run / "iter1/eval/against-iter0-shortest.parquet"]
    assert stage.inputs["ranker"] == identity
    of_report = report.report_stage(recipe, run, 1)
    assert of_report.settings == {"iteration": 1, "judge": "two_rankers:shortest"}
    assert of_report.inputs["judge"] == identity


@pytest.mark.parametrize(
    ("ranker", "name"),
    [
        ("/data/best model/v1", "reward-model-v1"),
        ("Skywork/Skywork-Reward-V2-Qwen3-8B", "reward-model-Skywork-Reward-V2-Qwen3-8B"),
        ("/data/größe: 8b", "reward-model-gr_e_8b"),
        ("/data/ranker", "reward-model-ranker"),
        ("..", "reward-model-.."),
        ("Skywork/Skywork-Reward-V2-Llama-3.1-8B", "reward-model-Skywork-Reward-V2-Llama-3.1-8B"),
        ("/data/" + "x" * 200, "reward-model-" + "x" * 60),
    ],
)
def test_a_judges_name_is_safe_in_a_file_name(tmp_path: Path, ranker: str, name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("sppo.rankers.reward_model.identity", lambda recipe: {"ranker": recipe.ranker})
    run = held_out(tmp_path / "run")
    found = judges(Recipe(judge=f"reward-model:{ranker}"))
    assert list(found) == ["ranker", name]
    (output,) = match_stage(found[name], name, run, 0, 1).outputs
    assert re.fullmatch(rf"against-iter0-{re.escape(name)}-[0-9a-f]{{8}}\.parquet", output.name)
    assert output.parent == run / "iter1" / "eval"


def expected(directory: Path, new: int, old: int) -> float:
    """The mean of P that iteration `new`'s answers beat `old`'s, by transformers alone."""
    lengths, rates = {1: 6, 0: 4, 2: 9}, []
    for n in range(2):
        texts = ["x" * (lengths[which] + k) for which in (new, old) for k in range(2)]
        r = one_by_one(directory, [{"role": "user", "content": f"q{n}"}], texts)
        rates += [1 / (1 + np.exp(-r[i, j])) for i in (0, 1) for j in (2, 3)]
    return float(np.mean(rates))


def test_a_reward_model_judges_the_matrix(run: Path) -> None:
    """The win rates are the model's own; another model in a directory of the same name gets files of its own."""
    first = make(run.parent / "a" / "rm", "llama")
    shown_ = tiny.succeed(*command(run, f"--judge=reward-model:{first}"), PYTHONPATH=str(run.parent))
    found = read_json(run / "matrix.json")
    assert found["ranker"] == "mine:longer"
    assert found["judge"]["name"] == "reward-model:rm"
    for new, old in ((1, 0), (2, 0), (2, 1)):
        assert found["judge"]["win_rates"][new][old] == pytest.approx(expected(first, new, old), abs=2e-4)
    assert "reward-model:rm" in shown_
    kept = {path: path.read_bytes() for path in (run / "iter1/eval").glob("against-iter0-reward-model-rm-*.parquet")}
    assert len(kept) == 1

    second = run.parent / "b" / "rm"
    shutil.copytree(first, second)
    (second / "note.json").write_text("{}")
    tiny.succeed(*command(run, f"--judge=reward-model:{second}"), PYTHONPATH=str(run.parent))
    assert len(list((run / "iter1/eval").glob("against-iter0-reward-model-rm-*.parquet"))) == 2
    assert {path: path.read_bytes() for path in kept} == kept
    gone = tiny.run(*command(run, "--judge=reward-model:./nowhere"), PYTHONPATH=str(run.parent))
    assert gone.returncode == 1
    assert "--judge reward-model:nowhere: ranker ./nowhere: no such directory" in gone.stderr


def test_a_reward_model_judges_the_report(tmp_path: Path, rankers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures stand beside the ranker's under its own name; a wrong one is told before an answer is drawn."""
    run, drawn = held_out(tmp_path / "run"), []
    monkeypatch.setattr(
        report, "_answers", lambda recipe, here: drawn.append(here) or here / "eval" / "responses.parquet"
    )
    directory = make(tmp_path / "rm-3.1", "llama")
    recipe = Recipe(**FUNCTION, judge="reward-model:./nowhere", eval_prompts="p", eval_pairs=2)
    with pytest.raises(SPPOError, match="^--judge reward-model:nowhere: ranker ./nowhere: no such directory"):
        report.report(recipe, run, 1, "base")
    assert not drawn
    report.report(replace(recipe, judge=f"reward-model:{directory}"), run, 1, "base")
    found, rates = read_json(run / "summary.json")[0], []
    for n in range(4):
        texts = ["x" * (1 + k + 4 * number) for number in (1, 0) for k in range(2)]
        r = one_by_one(directory, [{"role": "user", "content": f"q{n}"}], texts)
        rates += [1 / (1 + np.exp(-r[i, j])) for i in (0, 1) for j in (2, 3)]
    assert found["reward-model-rm-3.1_win_rate"] == pytest.approx(np.mean(rates), abs=2e-4)
    assert found["ranker_win_rate"] > 0.9  # the longer ones
    assert "reward-model-rm-3.1_win_rate" in report.summary_table([found])[0]
    by = report.comparing(replace(recipe, judge=f"reward-model:{directory}"), run, 1, "base")
    assert report.report_stage(by, run, 1).is_current()


def test_a_server_judges_the_matrix_and_need_not_be_there_again(run: Path, stub: tuple[type[Stub], str]) -> None:
    """Its address is in no file's name and in no identity: elsewhere, or away, what is done is done."""
    server, url = stub
    server.behave = lambda number: (200, says("A", {"A": -0.2, "B": -1.8}))
    env = {"PYTHONPATH": str(run.parent), "OPENAI_API_KEY": "k"}
    tiny.succeed(*command(run, f"--judge=judge:tiny-judge@{url}"), **env)
    assert {asked["model"] for asked in server.asked} == {"tiny-judge"}
    found = read_json(run / "matrix.json")
    assert found["judge"]["name"] == "judge:tiny-judge"
    assert np.allclose(found["judge"]["win_rates"], 0.5)  # the first of each pair, whichever it is
    before, asked = (run / "matrix.json").read_bytes(), len(server.asked)
    tiny.succeed(*command(run, "--judge=judge:tiny-judge@http://127.0.0.1:9/v1"), **env)
    assert (run / "matrix.json").read_bytes() == before
    assert len(server.asked) == asked
    shutil.rmtree(run / "iter2" / "eval")
    answers(run, 2, 8, prompts=2)
    refused = tiny.run(*command(run, f"--judge=judge:another@{url}"), **env)
    assert refused.returncode == 1
    assert f"--judge judge:another: {url} serves tiny-judge, not" in refused.stderr
    assert not list((run / "iter2/eval").glob("against-*"))  # before the ranker had begun


def looked(recipe: Recipe, cards: dict[str, tuple[int, int]] | None = None) -> list[str]:
    machines = Machines(1 << 30, cards or {})
    return [f"{f.level}: {f.text}" for f in check_judge(Run(recipe, [CPU], []), machines)]


def test_the_preflight_looks_at_the_judge(tmp_path: Path, stub: tuple[type[Stub], str]) -> None:
    """A wrong judge shows before the first response is drawn, and not after the first iteration's training."""
    directory = make(tmp_path / "rm", "llama")
    (told,) = looked(Recipe(judge=f"reward-model:{directory}", ranker_revision="a-commit-of-the-ranker"))
    assert re.search(r"^ok: --judge reward-model:rm: .* parameters, .*; it loads and answers a trial pair", told)
    small = looked(Recipe(judge=f"reward-model:{directory}"), {"0": (100, 100)})
    assert small[0].startswith("no: --judge reward-model:rm: ")
    assert "100 bytes of GPU memory is free" in small[0]
    with pytest.raises(SPPOError, match="^--judge reward-model:nowhere: ranker ./nowhere: no such directory"):
        looked(Recipe(judge="reward-model:./nowhere"))
    server, url = stub
    server.behave = lambda number: (200, says("A", {"A": -0.2, "B": -1.8}))
    told = looked(Recipe(judge=f"judge:tiny-judge@{url}", ranker_url="http://127.0.0.1:9/v1"))
    assert told == [f"ok: --judge judge:tiny-judge at {url} answers a trial question"]
    with pytest.raises(SPPOError, match="^--judge judge:other: .* serves tiny-judge, not"):
        looked(Recipe(judge=f"judge:other@{url}"))
    assert looked(Recipe()) == []


def test_a_judges_failures_name_its_own_flag(run: Path, stub: tuple[type[Stub], str], capsys: Any) -> None:
    """--ranker_url and --judge_template are not its settings: who follows such advice changes the ranker."""
    server, url = stub
    ask = f"judge:tiny-judge@{url}"
    named = "^--judge judge:tiny-judge: "
    server.behave = lambda number: (200, {"ok": True})
    with pytest.raises(SPPOError, match=f"{named}.*the address in --judge usually ends in /v1") as wrong:
        looked(Recipe(judge=ask, ranker_retries=0))
    server.behave = lambda number: (404, {"error": {"message": "no"}})
    with pytest.raises(SPPOError, match=f"{named}.*check --judge, and the address in --judge") as lost:
        looked(Recipe(judge=ask, ranker_retries=0))
    server.behave = lambda number: (200, says("Hm"))
    with pytest.raises(SPPOError, match=f"{named}.*without a verdict.*enable_thinking") as unsaid:
        looked(Recipe(judge=ask))
    found = [wrong, lost, unsaid]

    server.behave = lambda number: (200, says("A")) if number < len(server.asked) - 1 else (500, {"error": {}})
    recipe = Recipe(ranker="mine:longer", judge=ask, ranker_retries=0, ranker_concurrency=1)
    with pytest.raises(SPPOError, match=f"{named}the judge at .* gives no answer") as gone:
        match(judges(recipe)["judge-tiny-judge"], "judge-tiny-judge", run, 0, 1)
    for failure in (*found, gone):
        assert not re.search("--(ranker|judge_)", str(failure.value))


def test_a_long_name_stays_inside_its_picture() -> None:
    """matplotlib cuts a title off at the picture's edge."""
    name = "reward-model-" + "-".join(["Skywork", "Reward", "V2", "Llama", "3.1", "8B"] * 2)
    rates = {
        f"{who}_{what}": value
        for who in ("ranker", name)
        for what, value in (("win_rate", 0.6), ("interval", [0.5, 0.7]))
    }
    rows = [{"iteration": i, "prompts": 5, **rates} for i in (1, 2)]
    tables: dict[str, Any] = {key: [[0.5, 0.4], [0.6, 0.5]] for key in ("win_rates", "low", "high")}
    matrix = {"models": ["iter0", "iter1"], **tables, "judge": {"name": name.replace("-", ":", 1), **tables}}
    made = RunRecord(
        "r", {}, [IterationRecord(i, compared=row) for i, row in enumerate(rows, 1)], {}, matrix, [], {}, [], {}, []
    )
    for picture in (*figures.win_rates([made]), *figures.matrix(made)):
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
        assert max(map(len, texts)) <= 50, texts
    assert shown(Recipe(ranker="a/b", ranker_backend="judge", ranker_url=A_SERVER)) == "judge:a/b"

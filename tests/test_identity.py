"""What a result was made from: every setting that decides it, every shard of it, and nothing of another run's."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import preferences
import pyarrow.parquet as pq
import pytest
import tiny
from bad_input import call
from stub_server import Stub, says
from test_ranking import write_responses

from sppo import cli
from sppo import iterations as runs
from sppo.command.errors import SPPOError, UsageError
from sppo.evaluation import best, report
from sppo.evaluation.matrix import match_stages, win_matrix
from sppo.evaluation.measures import measure_stage
from sppo.evaluation.step import step_stage
from sppo.evaluation.suites import mt_bench, open_llm
from sppo.evaluation.suites.suite import Order, SuiteJudge, draw_answers
from sppo.generation.combine import combine, combine_stage
from sppo.generation.prompts import load_prompts
from sppo.generation.shards import generate_shards
from sppo.generation.source import Source
from sppo.launch.watch import run_shards
from sppo.models.policy import policy_of
from sppo.pairing.training_set import compute_prob, pairing_stage
from sppo.plan import driver_parser
from sppo.rankers.pinning import preload
from sppo.ranking.shards import rank_shards, rank_stage
from sppo.recipe import KEYS, Recipe, load_recipe
from sppo.schema import responses_schema
from sppo.store.directories import work_of
from sppo.store.files import read_json, write_json
from sppo.store.journal import Journal
from sppo.store.manifest import OVERWRITE, Stage
from sppo.store.parquet import read_rows, write_parquet
from sppo.store.rankings import ranking_files
from sppo.store.shards import Slice, shard_count
from sppo.training.batches import MicroBatches
from sppo.training.settings import prepare

# journals

OURS, OTHERS = ({"inputs": {"model": "m"}, "settings": {"seed": seed}} for seed in (1, 2))


def journal_of(path: Path, items: int) -> bytes:
    journal = Journal(path, OURS)
    for i in range(items):
        journal.add(f"p{i}", {"n": i})
    journal.close()
    return path.read_bytes()


def test_a_journal_of_another_identity_is_refused_by_name_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "j"
    written = journal_of(path, 2)
    with pytest.raises(
        SPPOError, match=r"other inputs or settings:\n  settings\.seed: 1 there, 2 now\n(.|\n)*--overwrite"
    ):
        Journal(path, OTHERS)
    assert path.read_bytes() == written
    mine = Journal(path, OURS)
    assert {key: mine.read(key) for key in mine.done} == {"p0": {"n": 0}, "p1": {"n": 1}}
    mine.close()
    dropped = Journal(path, OTHERS, overwrite=True)
    assert not dropped.done
    dropped.add("p0", {"n": 5})
    dropped.close()
    kept = Journal(path, OTHERS, overwrite=True)  # killed, and started again with --overwrite: its own work stays
    assert kept.read("p0") == {"n": 5}
    kept.close()


def test_a_templated_ranking_is_refused_under_other_arguments_of_the_template(world: Path) -> None:
    """It notes them also where there are none."""

    def stage(**arguments: Any) -> Stage:
        recipe = Recipe(model=str(world / "model"), ranker=str(world / "PairRM"), pairs=2)
        return rank_stage(replace(recipe, chat_template_kwargs=arguments), world / "data", Slice(0, 0))

    with pytest.raises(SPPOError, match=r"ranker\.chat_template_kwargs\.enable_thinking: null there, false now"):
        stage(enable_thinking=False).refuse_if_different(stage().identity)


@pytest.mark.parametrize("damage", ["first line", "first line, and the last cut"])
def test_a_damaged_first_line_keeps_what_fits(tmp_path: Path, damage: str) -> None:
    """It names no identity, so the items tell whose they are. Without a whole item nothing is lost."""
    path = tmp_path / "j"
    content = bytearray(journal_of(path, 2))
    content[0] ^= 1
    path.write_bytes(content[:-3] if "cut" in damage else content)
    with pytest.raises(SPPOError, match="first line is damaged, and none of its items was made under these inputs"):
        Journal(path, OTHERS)
    mine = Journal(path, OURS)
    assert list(mine.done) == (["p0"] if "cut" in damage else ["p0", "p1"])
    mine.close()
    path.write_bytes(content[: content.index(b"\n") + 9])  # killed while the first item was written
    other = Journal(path, OTHERS)
    assert not other.done
    other.close()


def test_another_judge_does_not_drop_what_is_paid_for(tmp_path: Path, stub: tuple[type[Stub], str]) -> None:
    """MT-Bench, stopped under judge A: B is refused with both names, and A's command asks for the rest alone."""
    server, url = stub
    rated = (200, says("Rating: [[5]]"))
    server.behave = lambda n: rated if n < 3 else (403, {"error": {"message": "no credit"}})
    requests = [{"messages": [{"role": "user", "content": f"answer {n}"}], "temperature": 0} for n in range(8)]

    def judged(name: str, overwrite: bool = False) -> list[dict[str, Any]]:
        order = Order("mt_bench", Recipe(), tmp_path, "", url, name, overwrite)
        judge = SuiteJudge(order)
        judge.refuse_another()
        return judge.choices(requests, lambda choice: "[[5]]" in str(choice), "a rating")

    with pytest.raises(SPPOError, match="check OPENAI_API_KEY"):
        judged("A")
    journal = tmp_path / "judgements.journal"
    written, before = journal.read_bytes(), len(server.asked)
    assert written.count(b"\n") == 1 + 3
    with pytest.raises(
        SPPOError, match=r'judge: "A" there, "B" now(.|\n)*--judge_model(.|\n)*--output_dir(.|\n)*--overwrite'
    ):
        judged("B")
    assert (journal.read_bytes(), len(server.asked)) == (written, before)
    server.behave = lambda n: rated
    assert len(judged("A")) == 8
    assert len(server.asked) - before == 8 - 3
    assert len(judged("B", overwrite=True)) == 8
    assert [request["model"] for request in server.asked[-8:]] == ["B"] * 8


# shards


def test_shards_share_evenly() -> None:
    """96 prompts in 64 shards were given to 48 of them."""
    sizes = [stop - start for start, stop in (Slice(0, i, 64).bounds(96) for i in range(64))]
    assert sorted(set(sizes)) == [1, 2]
    assert sum(sizes) == 96
    assert [Slice(0, i, 3).bounds(10) for i in range(3)] == [(0, 3), (3, 6), (6, 10)]
    assert [Slice(4, i, 3).bounds(10) for i in range(3)] == [(0, 4), (4, 8), (8, 10)]  # --frac_len, as released


@pytest.fixture
def rankers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def {0}(prompt, a, b):\n    return float(len({1}) - len({2}))\n"
    source = source.format("longest", "a", "b") + source.format("shortest", "b", "a")
    (tmp_path / "two_rankers.py").write_text(source + "def measure(prompt, answer):\n    return {}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "two_rankers", raising=False)


def ranked(data: Path, by: str, count: int, shards: list[int] | None = None, overwrite: bool = False) -> Recipe:
    """Rank some of so many shards with the function `by`."""
    recipe = Recipe(pairs=3, ranker=f"two_rankers:{by}", ranker_backend="function")
    numbers = range(count) if shards is None else shards
    rank_shards(recipe, data, [Slice(0, i, count) for i in numbers], overwrite)
    return recipe


def rows_of(data: Path) -> list[list[int]]:
    return [read_json(path.with_suffix(".manifest.json"))["settings"]["rows"] for path in ranking_files(data)]


def test_a_damaged_note_of_the_shards_is_refused_and_says_what_to_write(tmp_path: Path, rankers: None) -> None:
    """An older version's, which gave each shard ceil(N / n) rows and noted their number alone, too."""
    data = write_responses(tmp_path / "data", 10, 3)
    recipe = ranked(data, "longest", 3)
    note = data / "ranking" / "shards.json"
    for damaged in ("{}", "[]", '{"shards": 0}', '{"shards": 3}', '{"shards', "\udcff"):
        note.write_text(damaged, "utf-8", "surrogateescape")
        with pytest.raises(SPPOError, match=r"shards\.json is damaged, or another version's.*Write {") as raised:
            compute_prob(recipe, data, True)
    note.write_text(re.findall("{.*?}", str(raised.value))[0])  # as it says
    ranked(data, "longest", 3)
    compute_prob(recipe, data, True)
    assert rows_of(data) == [[0, 3], [3, 6], [6, 10]]


def test_an_overwrite_that_was_killed_goes_on_and_keeps_what_it_had_made(
    tmp_path: Path, rankers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command deleted the shards again that it had finished: judgements that were paid for."""
    data = write_responses(tmp_path / "data", 9, 3)
    ranked(data, "longest", 3)
    monkeypatch.setenv(OVERWRITE, "")

    def stamps() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in sorted((data / "ranking").glob("*.parquet"))}

    first = stamps()

    def start(by: str, until: int, slots: int = 3) -> list[bool]:
        """--overwrite as the launcher starts it, killed before the shard `until`; which shards are not as before."""
        before = stamps()

        def run(command: list[str], *_: object) -> Any:
            for number in map(int, command[command.index("--data_frac") + 1].split(",")):
                if number >= until:
                    return SimpleNamespace(poll=lambda: 1)
                ranked(data, by, int(command[command.index("--numgpu") + 1]), shards=[number], overwrite=True)
            return SimpleNamespace(poll=lambda: 0)

        launcher = SimpleNamespace(slots=lambda: slots, start=run, stop=lambda tasks: None)
        with contextlib.suppress(SystemExit):
            run_shards(launcher, 0, data / "ranking", tmp_path / "logs", "rank", ["rank.py", "--overwrite"])
        return [before[name] != stamp for name, stamp in stamps().items()]

    assert start("longest", until=1) == [True, False, False]  # all stood: again means again
    assert start("longest", until=2, slots=1) == [False, True, False]
    assert start("longest", until=9) == [False, False, True]
    assert first.keys() == stamps().keys()
    assert not (data / "ranking" / "overwrite.json").exists()
    assert start("longest", until=2) == [True, True, False]
    assert start("shortest", until=9) == [True, True, True]  # by another one than before the kill
    assert start("shortest", until=9) == [True, True, True]


def test_an_overwrite_with_fewer_shards_leaves_none_of_the_old(tmp_path: Path, rankers: None) -> None:
    """Left over, the old ranker's shards chose 6 of 9 best answers."""
    data, fresh = (write_responses(tmp_path / name, 9, 3) for name in ("data", "fresh"))
    ranked(data, "shortest", 3)
    for name in ("notes.txt", "shard-00007.txt"):  # somebody's
        (data / "ranking" / name).touch()
    assert shard_count(data / "ranking", 0, 1) == 3
    ranked(data, "longest", 1, overwrite=True)
    names = ["notes.txt", "shard-00000.manifest.json", "shard-00000.parquet", "shard-00007.txt", "shards.json"]
    assert sorted(p.name for p in (data / "ranking").iterdir()) == names
    recipe, rows = ranked(fresh, "longest", 1), list(read_rows(data / "responses.parquet", ["prompt_id", "responses"]))
    found = best._choose(recipe, data, rows)
    assert found == best._choose(recipe, fresh, rows)
    for row in rows:
        lengths = [len(response["text"]) for response in row["responses"]]
        assert lengths[found[row["prompt_id"]].index] == max(lengths)
    for directory in (data, fresh):
        compute_prob(recipe, directory, False)
    assert pq.read_table(data / "train.parquet").equals(pq.read_table(fresh / "train.parquet"))


def test_generation_overwritten_with_fewer_shards_is_a_fresh_run(models: Path, tmp_path: Path) -> None:
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Why {i}?"} for i in range(7)])
    recipe = Recipe(model=str(models / "llama3"), prompts=str(prompts), pairs=2, maxlen=4, engine="transformers")
    data, fresh = tmp_path / "data", tmp_path / "fresh"
    generate_shards(recipe, data, [Slice(0, i, 3) for i in range(3)], False)
    combine(data, 3, 2, False)
    recipe.temperature = 1.5
    generate_shards(recipe, data, [Slice(0, 0)], True)
    generate_shards(recipe, fresh, [Slice(0, 0)], False)
    assert sorted(p.name for p in (data / "responses").iterdir()) == sorted(
        p.name for p in (fresh / "responses").iterdir()
    )
    assert pq.read_table(data / "responses.parquet").equals(pq.read_table(fresh / "responses.parquet"))


def test_shards_of_two_rankers_are_not_joined(tmp_path: Path, rankers: None) -> None:
    data = write_responses(tmp_path / "data", 8, 3)
    recipe = ranked(data, "longest", 2, [0])
    ranked(data, "shortest", 2, [1])
    for join in (lambda: compute_prob(recipe, data, True), lambda: best._choose(recipe, data, [])):
        with pytest.raises(
            SPPOError, match=r"not of one ranker:\n  ranker\.ranker: .*longest\" there, .*shortest\" now"
        ):
            join()
    assert not (data / "train.parquet").exists()


def test_a_shard_that_was_never_ranked_is_no_dropped_prompt(tmp_path: Path, rankers: None) -> None:
    """It was counted as "not ranked: 4", and trained on without."""
    data = write_responses(tmp_path / "data", 12, 3)
    recipe = ranked(data, "longest", 3, [0, 2])
    with pytest.raises(SPPOError, match=r"made in 3 shards, and not ranked are shard-00001\.parquet; run rank.py"):
        compute_prob(recipe, data, False)
    (data / "ranking" / "shards.json").unlink()  # somebody has deleted it
    with pytest.raises(SPPOError, match="rows 4 to 8 of .* were never ranked"):
        compute_prob(recipe, data, False)
    for manifest in (data / "ranking").glob("*.manifest.json"):  # another tool's, which may leave prompts out
        manifest.unlink()
    (data / "ranking" / "shard-00002.parquet").rename(data / "ranking" / "mine.parquet")
    compute_prob(recipe, data, False)
    assert read_json(data / "train.manifest.json")["counts"]["dropped"]["not ranked"] == 4
    write_json(data / "ranking" / "shards.json", {"shards": 1, "even": True})
    (data / "ranking" / "shard-00000.manifest.json").touch()
    with pytest.raises(SPPOError, match=r"holds mine\.parquet besides the 1 shards of rank.py"):
        compute_prob(recipe, data, True)


# settings: each one changes the identity of what it decides, or stands here with the reason why not

FILES = "says which files are read; the identity holds what was read"
PLACE = "decides only where and how fast"
JUDGES = ("judge_template", "judge_verdict", "judge_max_tokens", "judge_votes")
ALWAYS = {
    **dict.fromkeys("model_revision prompts_revision prompt_split ranker_revision anchor_revision".split(), FILES),
    **dict.fromkeys("batch_tokens gpu_memory_utilization gradient_checkpointing".split(), PLACE),
    **dict.fromkeys(
        "ranker_concurrency ranker_timeout ranker_retries logging_steps save_steps report_to".split(), PLACE
    ),
    "ranker_url": "the same judge may be served anywhere",
    "ranker_template": "only a pair-lm is asked by it, and with any other ranker it is refused",
    **dict.fromkeys(JUDGES, "only a judge is asked by it"),
}
NO_TEMPLATE = dict.fromkeys(
    "model trust_remote_code ranker_prompt ranker_system chat_template_kwargs date".split(),
    "this ranker reads no template of the policy's",
)
TEXT = {key: "the ranker reads the prompt's text" for key in NO_TEMPLATE if key != "ranker_prompt"}
NO_SYSTEM = {"ranker_system": "for rankers with a chat template of their own; a recipe with it is refused here"}
ACCUMULATES = {"batch_size": "a step's gradient is a sum over its rows, and the identity holds how many these are"}
OWN = "the suite has its own"
ELSEWHERE: dict[str, dict[str, str]] = {
    "generate": {"extra_responses": "only looked at here, and joined where the shards are put together"},
    "combine": dict.fromkeys(("model", "trust_remote_code"), "asked for the tokenizer, which must be the shards' own"),
    "rank, a function": NO_TEMPLATE,
    "rank, PairRM and the text": TEXT,
    "rank, PairRM": NO_SYSTEM,
    "rank, a reward model": {k: reason for k, reason in NO_TEMPLATE.items() if k not in ("date", "ranker_system")},
    "rank, a GPM": {k: reason for k, reason in NO_TEMPLATE.items() if k not in ("date", "ranker_system")},
    "rank, a causal LM": {k: r for k, r in NO_TEMPLATE.items() if k not in ("date", "chat_template_kwargs")},
    **dict.fromkeys(("best_of_n", "win matrix"), NO_SYSTEM),
    "rank, a judge": {key: reason for key, reason in NO_TEMPLATE.items() if key != "chat_template_kwargs"},
    "report": {**NO_SYSTEM, "stop_when": "decides after which iteration a run ends, and nothing that is compared"},
    "train": ACCUMULATES,
    "train, RSPO": ACCUMULATES,
    "train, sigmoid": ACCUMULATES,
    "train, LoRA": ACCUMULATES,
    "evaluate, mt_bench": {"temperature": OWN, "top_p": OWN},
    "evaluate, open_llm": dict.fromkeys(
        "dtype maxlen temperature top_p prompt_seeds system_prompt chat_template_kwargs thinking_tags thinking_budget "
        "date".split(),
        OWN,
    ),
}
# where a stage's work is done, and what it is called: no result depends on it; what it reads there is in the identity
WHERE = set(
    "gpus launcher world_size shards nodes ray_address gpus_per_node sbatch accelerate_config name run_dir iteration "
    "prompts_part data_dir dataset model_dir".split()
)
NOT_IN_A_STAGE = {
    "evaluate": "asks for the win matrix, or not",
    "iterations": "how many iterations there are changes none of them",
    "split_prompts": "decides which prompts an iteration reads, and their fingerprint is in the identity",
    **dict.fromkeys(("org", "public", "push_model"), "decides what is pushed, which pushed.json remembers"),
}
ANOTHER: dict[str, Any] = {
    **{"prompt_column": "question", "pairs": 4, "maxlen": 9, "engine": "vllm", "temperature": 0.3, "top_p": 0.4},
    "dtype": "bfloat16",
    **{"seed": 7, "prompt_seeds": False, "system_prompt": "Be brief.", "chat_template_kwargs": {"a": 1}},
    **{"trust_remote_code": True, "gpu_memory_utilization": 0.5, "batch_tokens": 64},
    **{"ranker_concurrency": 3, "ranker_timeout": 5.0, "ranker_retries": 1, "ranker_url": "http://b/v1"},
    **{"ranker_temperature": 2.0, "ranker_system": "drop", "select": "best_2sd", "min_margin": 0.25},
    **{"ranker_template": "rlhflow", "judge_template": "mt-bench", "judge_verdict": "(A|B)"},
    **{"judge_max_tokens": 9, "judge_votes": 3},
    **{"estimator": "paper", "length_penalty": 0.5, "test_size": 2, "keep_degenerate": True, "ranker_prompt": "text"},
    **{"loss_type": "ipo", "beta": 0.5, "anchor": 0.3, "label_smoothing": 0.1, "learning_rate": 0.5, "optim": "sgd"},
    **{"lr_scheduler_type": "cosine", "warmup_ratio": 0.5, "num_train_epochs": 2.0, "schedule_epochs": 3.0},
    **{"weight_decay": 0.1, "max_grad_norm": 1.0, "global_batch_size": 32, "batch_size": 4, "accumulate": 16},
    **{"gradient_checkpointing": False, "max_prompt_length": 7, "max_length": 900, "attn_implementation": "sdpa"},
    **{"train_thoughts": False, "reg": "forward", "reg_coef": 0.2},
    **{"use_peft": True, "lora_r": 3, "lora_alpha": 5, "lora_target_modules": "q_proj", "load_in_4bit": True},
    **{"merge_adapter": True, "logging_steps": 9, "save_steps": 9, "report_to": "tensorboard", "eval_pairs": 3},
    **{"judge": "two_rankers:shortest", "measure": "two_rankers:measure", "base_perplexity": True},
    "stop_when": "judge",
    **dict.fromkeys("model_revision prompts_revision ranker_revision anchor_revision".split(), "main"),
    **{"prompt_split": "test", "date": "2024-02-29", "thinking_tags": "<think>,</think>", "thinking_budget": 5},
}


def finish(data: Path) -> None:
    """Give responses.parquet a manifest."""
    Stage("combine", data / "responses.manifest.json", [data / "responses.parquet"], {}, {}).finish({})


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stages read, two of each: a model with a Python file of its own, prompts, a PairRM; and a run's files."""
    here = tmp_path_factory.mktemp("world")
    for name in ("model", "model2"):
        shutil.copytree(models / "llama3", here / name)
        (here / name / "own.py").write_text("own = True\n")
        (here / name / "chat_template.jinja").write_text(f"{{{{ strftime_now('%d %b %Y') }}}}{tiny.LLAMA3_TEMPLATE}")
    for name in ("PairRM", "PairRM2"):
        shutil.copytree(models / "PairRM", here / name)
    shutil.copytree(models / "tiny-deberta", here / "tiny-deberta")
    for name in ("model2", "PairRM2"):
        (here / name / "note.json").write_text("{}")
    for name in ("p", "p2"):
        rows = [{"prompt": f"{name} {i}?", "question": f"{i}, {name}?"} for i in range(4)]
        tiny.write_jsonl(here / f"{name}.jsonl", rows)
    for data in ("data", "run/iter0/eval", "run/iter1/eval"):
        finish(write_responses(here / data, 4, 2))
    for path in ("data/responses/shard-00000.parquet", "data/ranking/shard-00000.parquet"):
        (here / path).parent.mkdir()
        (here / path).touch()
    preferences.write(here / "train", preferences.rows(4))
    return here


def rank_identity(recipe: Recipe, world: Path) -> list[Stage]:
    return [rank_stage(recipe, world / "data", Slice(0, 0))]


def drawn_identity(recipe: Recipe, world: Path) -> list[Stage]:
    return [Source.of(recipe).stage(world / "new", Slice(0, 0))]


def training_identity(recipe: Recipe, world: Path) -> list[Stage]:
    return [prepare(replace(recipe, dataset=str(world / "train"), model_dir=str(world / "trained")), 2).stage]


def report_identity(recipe: Recipe, world: Path) -> list[Stage]:
    """As sppo/iterations.py asks whether an iteration's report is done."""
    run = world / "run"
    drawing = replace(recipe, prompts=recipe.eval_prompts, pairs=recipe.eval_pairs)
    by = report.comparing(recipe, run, 1, recipe.model)
    return [
        *drawn_identity(drawing, world),
        measure_stage(recipe, run / "iter1/eval", recipe.model),
        report.report_stage(by, run, 1),
        step_stage(by, run, 1),
    ]


def matrix_identity(recipe: Recipe, world: Path) -> list[Stage]:
    return list(match_stages(recipe, world / "run").values())


def best_identity(recipe: Recipe, world: Path) -> list[Stage]:
    recipe = replace(recipe, pairs=2)
    chosen = best.best_stage(recipe, world / "data")
    return [*drawn_identity(recipe, world), chosen]


def suite_identity(suite: str) -> Callable[[Recipe, Path], list[Stage]]:
    """The stage that draws a suite's answers, with the settings that the suite gives to scripts/generate.py."""

    def identity(recipe: Recipe, world: Path) -> list[Stage]:
        order = Order(suite, replace(recipe, pairs=1), world / "suites", judge_model="judge")
        asked: list[Recipe] = []
        conversation = {"1": [{"role": "user", "content": "a"}]}
        question = {"question_id": 1, "category": "writing", "turns": ["a", "b"]}

        def draw(drawing: Recipe, *_: Any) -> Path:
            asked.append(drawing)
            raise InterruptedError

        with mock.patch("sppo.evaluation.suites.suite.draw", draw), contextlib.suppress(InterruptedError):
            mt_bench.two_turns(order, [question]) if suite == "mt_bench" else draw_answers(order, conversation, suite)
        return drawn_identity(asked[0], world)

    return identity


def tasks_identity(recipe: Recipe, world: Path) -> list[Stage]:
    order = Order("open_llm", recipe, world / "suites")
    return [open_llm.tasks_stage(order, policy_of(recipe), ["arc"])]


PAIRRM = {"ranker": "PairRM", "ranker_backend": "pairrm", "chat_template_kwargs": {"b": 2}}
THINKS = {"thinking_tags": "<a>,</a>"}
EVALUATION = {"eval_prompts": "p.jsonl", **PAIRRM, **THINKS}
FUNCTION = {"ranker": "two_rankers:longest", "ranker_backend": "function"}
ANCHOR = {"anchor": 0.1, "anchor_model": "model"}
REG = {"reg": "reverse", "reg_coef": 0.1, "anchor_model": "model"}
# by name: the script, the stages that do its work, the settings to begin with; what is changed in another way
SCENARIOS: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any]]] = {
    "generate": ("generate", drawn_identity, THINKS, {}),
    "combine": ("combine_generate", lambda r, w: [combine_stage(w / "data", 1, r.pairs, r.extra_responses)], {}, {}),
    "rank, a function": (
        "rank",
        rank_identity,
        FUNCTION,
        {"ranker": "two_rankers:shortest", "ranker_backend": "judge"},
    ),
    "rank, PairRM": ("rank", rank_identity, PAIRRM, {}),
    "rank, PairRM and the text": (
        "rank",
        rank_identity,
        {**PAIRRM, "ranker_prompt": "text"},
        {"ranker_prompt": "templated"},
    ),
    "rank, a reward model": (
        *("rank", rank_identity, {"ranker": "model", "ranker_backend": "reward-model"}),
        {"ranker": "model2", "ranker_backend": "judge"},
    ),
    "rank, a GPM": (
        *("rank", rank_identity, {"ranker": "model", "ranker_backend": "gpm"}),
        {"ranker": "model2", "ranker_backend": "judge"},
    ),
    "rank, a causal LM": (
        *("rank", rank_identity, {"ranker": "model", "ranker_backend": "pair-lm"}),
        {"ranker": "model2", "ranker_backend": "judge"},
    ),
    "rank, a judge": (
        *("rank", rank_identity, {**FUNCTION, "ranker_backend": "judge", "ranker_url": "http://a/v1"}),
        {"ranker": "another", "ranker_backend": "function"},
    ),
    "compute_prob": ("compute_prob", lambda r, w: [pairing_stage(r, w / "data")], {}, {}),
    "train": ("train", training_identity, ANCHOR, {"loss_type": "sppo_all"}),
    "train, RSPO": ("train", training_identity, REG, {"loss_type": "sppo_single"}),
    "train, kto_pair": ("train", training_identity, {"loss_type": "kto_pair"}, {}),
    "train, sigmoid": ("train", training_identity, {"loss_type": "sigmoid"}, {}),
    "train, LoRA": ("train", training_identity, {"use_peft": True}, {"use_peft": False}),
    "best_of_n": ("best_of_n", best_identity, {**PAIRRM, **THINKS}, {}),
    "report": ("report", report_identity, EVALUATION, {}),
    "win matrix": ("win_matrix", matrix_identity, EVALUATION, {}),
    "evaluate, alpaca_eval": ("evaluate", suite_identity("alpaca_eval"), THINKS, {}),
    "evaluate, mt_bench": ("evaluate", suite_identity("mt_bench"), THINKS, {}),
    "evaluate, open_llm": ("evaluate", tasks_identity, {}, {}),
}
DECIDED: dict[str, set[str]] = {}  # by script: the settings that some scenario has decided


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_setting_is_in_the_identity_of_what_it_decides(name: str, world: Path, rankers: None) -> None:
    """Or it stands in ELSEWHERE, with a reason. A flag that contradicts another one is another scenario's to decide."""
    script, stages, settings, others = SCENARIOS[name]
    paths = {"ranker": "PairRM2", "model": "model2", "anchor_model": "model2", "prompts": "p2.jsonl"}
    paths["extra_responses"] = "p.jsonl"
    others = {**ANOTHER, **paths, "eval_prompts": "p2.jsonl", "ranker_backend": "llm-blender", **others}

    def found(key: str, value: Any) -> Any:
        return str(world / value) if isinstance(value, str) and (world / value).exists() and value else value

    def identity(values: dict[str, Any]) -> list[Any]:
        asked = {"model": "model", "prompts": "p.jsonl", "engine": "transformers", "pairs": 2, **values}
        recipe = Recipe(**{key: found(key, value) for key, value in asked.items()})
        return [stage.identity for stage in stages(recipe, world)]

    first, elsewhere = identity(settings), {**ALWAYS, **ELSEWHERE.get(name, {})}
    if settings.get("ranker_backend") == "pair-lm":
        del elsewhere["ranker_template"]
    if settings.get("ranker_backend") == "judge":
        elsewhere = {key: reason for key, reason in elsewhere.items() if key not in JUDGES}
    missing = {"engine"} if importlib.util.find_spec("vllm") is None else set()
    for key in set(KEYS[script]) - missing - WHERE:
        try:
            changed = identity({**settings, key: others[key]}) != first
        except UsageError:
            continue
        assert changed != (key in elsewhere), (
            f"{key}: {elsewhere.get(key, 'not in the identity, and no reason why not')}"
        )
        DECIDED.setdefault(script, set()).add(key)


def test_the_scenarios_decide_every_setting() -> None:
    scripts = {script for script, *_ in SCENARIOS.values()}
    if set(DECIDED) == scripts:  # else only some of them were run
        for script in scripts:
            assert set(KEYS[script]) - DECIDED[script] - WHERE <= {"engine"}, script
    read = {key for script in scripts for key in KEYS[script]}
    assert read | set(NOT_IN_A_STAGE) | WHERE == {f.name for f in fields(Recipe)}


def test_the_processes_decide_no_row_of_a_micro_batch() -> None:
    """kto_pair couples a micro-batch's rows. The global batch and --batch_size say which those are, and no more."""
    lengths = np.arange(50, 0, -1)

    def micro_batches(accumulate: int, ranks: int, batch: int = 2) -> list[tuple[int, ...]]:
        dealt = [MicroBatches(lengths, batch, accumulate, 1, ranks, rank, False) for rank in range(ranks)]
        return sorted(tuple(sorted(part.rows if part.counted else [])) for each in dealt for part in each)

    assert micro_batches(4, 1) == micro_batches(2, 2) == micro_batches(1, 4)
    assert micro_batches(2, 1, batch=4) != micro_batches(4, 1)


JUDGE = "def likes(prompt, a, b):\n    return {}\n"


def held_out(run: Path) -> Path:
    """A run whose two models have answered 4 held-out prompts, twice each; the second one's answers are longer."""
    for number in (0, 1):
        rows = [
            {
                "prompt_id": f"p{n}",
                "prompt": [{"role": "user", "content": f"q{n}"}],
                "responses": [{"text": "x" * (1 + k + 4 * number), "token_ids": [1] * (1 + k)} for k in range(2)],
                "prompt_token_ids": [1],
            }
            for n in range(4)
        ]
        write_parquet(run / f"iter{number}" / "eval" / "responses.parquet", responses_schema(), rows)
        finish(run / f"iter{number}" / "eval")
    (run / "iter1" / "model").mkdir()
    write_json(run / "iter1" / "model" / "sppo_manifest.json", {"loss": 1.0, "beta2_loss": 0.1})
    return run


def test_a_changed_judge_leaves_no_old_report(tmp_path: Path, rankers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name stays, the source changes: the comparisons refuse; --overwrite makes all anew."""
    run = held_out(tmp_path / "run")
    monkeypatch.setattr(report, "_answers", lambda recipe, directory, *_: directory / "eval/responses.parquet")
    recipe = Recipe(**FUNCTION, judge="a_judge:likes", eval_prompts="p", eval_pairs=2)

    def made(logit: str, overwrite: bool = False) -> tuple[float, float]:
        (tmp_path / "a_judge.py").write_text(JUDGE.format(logit))
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, "a_judge", raising=False)
        report.report(recipe, run, 1, "base", overwrite)
        matrix = win_matrix(recipe, run)
        return read_json(run / "iter1/eval/report.json")["likes_win_rate"], matrix["judge"]["win_rates"][1][0]

    longer, shorter = "100.0 * (len(a) - len(b))", "100.0 * (len(b) - len(a)) + 0.0"
    assert made(longer) == (1.0, 1.0)
    files = [run / "matrix.json", run / "summary.json", *(run / "iter1/eval").glob("*.*")]
    before = {path: path.read_bytes() for path in files}
    with pytest.raises(SPPOError, match=r"match: (.|\n)*inputs\.ranker\.source: (.|\n)*--overwrite"):
        made(shorter)
    assert {path: path.read_bytes() for path in files} == before
    assert not all(stage.is_current() for stage in match_stages(recipe, run).values())
    assert not report.report_stage(report.comparing(recipe, run, 1, "base"), run, 1).is_current()
    assert made(shorter, overwrite=True) == (0.0, 0.0)


def test_a_report_names_the_model_whose_template_was_used(world: Path) -> None:
    """The first model's, whatever the iteration trains."""
    recipe = Recipe(model=str(world / "model2"), ranker=str(world / "PairRM"), ranker_backend="pairrm")
    by = report.comparing(recipe, world / "run", 1, str(world / "model"))
    stage = report.report_stage(by, world / "run", 1)
    assert stage.inputs["ranker"]["model"] == policy_of(replace(recipe, model=str(world / "model"))).identity()


# what is refused changes nothing


def tree(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Each file's content and time."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def finished(models: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """(a run of one iteration that is done, its command); the first model stands for the trained one."""
    run, prompts = tmp_path / "run", tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Why {i}?"} for i in range(4)])
    words = [f"--model={models / 'llama3'}", f"--prompts={prompts}", "--pairs=2", "--maxlen=4", "--engine=transformers"]
    words += ["--ranker=two_rankers:longest", "--recipe=recipes/sppo/demo.yaml", "--iterations=1", "--keep_degenerate"]
    words = ["scripts/plan.py", *words, f"--run_dir={run}", "--gpus=none"]
    recipe = runs.iteration(runs.opened(cli.parse(driver_parser(""), words[1:])[1]), 1)
    words.append("--skip_preflight")
    data, model = run / "iter1" / "data", run / "iter1" / "model"
    generate_shards(recipe, data, [Slice(0, 0)], False)
    rank_shards(recipe, data, [Slice(0, 0)], False)
    compute_prob(recipe, data, False)
    shutil.copytree(models / "llama3", model)
    (group,) = runs.training_stages(recipe)
    replace(group[0], outputs=[model / "model.safetensors"]).finish({}, loss=1.0, beta2_loss=0.1, names={})
    runs.write(recipe)
    return run, words


def test_the_win_matrix_of_a_finished_run_reads_the_settings_of_this_start(
    models: Path, tmp_path: Path, rankers: None
) -> None:
    """It read iter1/recipe.yaml, which is written for a step that is not done: a server's old address stayed there."""
    run, words = finished(models, tmp_path)
    held_out = tiny.write_jsonl(tmp_path / "e.jsonl", [{"prompt": "Why?"}])
    code, said = call([*words, "--evaluate", f"--eval_prompts={held_out}", "--batch_tokens=777"], {})
    assert code == 0, said
    assert load_recipe(run / "iter1" / "recipe.yaml").batch_tokens == 777


def test_a_refused_command_changes_nothing(models: Path, tmp_path: Path, rankers: None) -> None:
    """iter1/recipe.yaml, which report.html shows, named settings that nobody had trained with."""
    run, words = finished(models, tmp_path)
    recipe = (run / "iter1" / "recipe.yaml").read_bytes()
    code, said = call([*words, "--logging_steps=9"], {})
    assert code == 0, said
    assert (run / "iter1" / "recipe.yaml").read_bytes() == recipe  # nothing was made with these settings
    data = [
        ("--temperature=0.9", "settings.temperature: 1.0 there, 0.9 now"),
        ("--ranker=two_rankers:shortest", "inputs.ranker.ranker"),
        ("--estimator=released", 'settings.estimator: "paper" there, "released" now'),
        ("--batch_size=7", "is not a multiple of"),
    ]
    training = [("--learning_rate=0.5 --beta=7", "settings.beta: "), ("--loss_type=hinge", "settings.loss_type")]

    def refuse(cases: list[tuple[str, str]]) -> None:
        before = tree(run)
        assert {"recipe.yaml", "commands.log"} <= {Path(name).name for name in before}
        for flag, message in cases:
            code, said = call([*words, *flag.split()], {})
            assert (code in (1, 2), message in said) == (True, True), said
            assert "--overwrite" not in said  # which drivers do not have
            assert tree(run) == before

    refuse([*data, *training])
    model = run / "iter1" / "model"
    identity = read_json(model / "sppo_manifest.json")
    write_json(work_of(model) / "identity.json", {key: identity[key] for key in ("inputs", "settings")})
    (model / "sppo_manifest.json").unlink()  # killed while it trained
    refuse([*data, *training])
    shutil.rmtree(work_of(model))
    for path in (run / "iter1" / "data").glob("*.*"):  # killed while it drew
        path.unlink()
    shard = run / "iter1" / "data" / "responses" / "shard-00000"
    written = read_json(shard.with_suffix(".manifest.json"))
    journal = Journal(shard.with_suffix(".journal"), {key: written[key] for key in ("inputs", "settings")})
    journal.add("p", {})
    journal.close()
    shard.with_suffix(".manifest.json").unlink()
    shard.with_suffix(".parquet").unlink()
    refuse(data[:1])


def test_another_ranker_is_not_pinned_over_the_one_that_ranked(tmp_path: Path, rankers: None) -> None:
    """ranker.json, written before rank.py refused, made the run's own command read the branch anew."""
    data = write_responses(tmp_path / "data", 4, 3)
    commits = {"": "c0", "c0": "c0", "v2": "c2"}
    fetched = SimpleNamespace(fetch=lambda recipe: f"snapshots/{commits[recipe.ranker_revision]}")
    mine, other = Recipe(ranker="acme/PairRM"), Recipe(ranker="acme/Other")

    def pin(asked: Recipe, overwrite: bool = False) -> bytes:
        with mock.patch("sppo.rankers.pinning.backend", return_value=fetched):
            preload(asked, data, overwrite)
        return (data / "ranker.json").read_bytes()

    pin(other)  # nothing is ranked yet
    pinned = pin(mine)
    ranked(data, "longest", 1)
    assert pin(mine) == pinned
    for asked, said in ((other, "acme/Other"), (replace(mine, ranker_revision="v2"), "v2")):
        with pytest.raises(SPPOError, match=f"the work of another ranker(.|\\n)*{said}(.|\\n)*--overwrite"):
            pin(asked)
        assert (data / "ranker.json").read_bytes() == pinned
    assert b"acme/Other" in pin(other, overwrite=True)


def test_other_questions_do_not_take_the_place_of_those_that_are_answered(tmp_path: Path) -> None:
    order = Order("alpaca_eval", Recipe(), tmp_path, judge_model="judge")
    where = tmp_path / "answers" / "alpaca_eval"

    def ask(question: str, order: Order = order) -> str:
        drawn = mock.patch("sppo.evaluation.suites.suite.draw", side_effect=InterruptedError)
        with drawn, contextlib.suppress(InterruptedError):
            draw_answers(order, {"1": [{"role": "user", "content": question}]}, "alpaca_eval")
        return (where / "prompts.jsonl").read_text()

    ask("first")
    assert "mended" in ask("mended")  # nothing is answered yet
    (where / "responses").mkdir()
    (where / "responses" / "shard-00000.journal").touch()
    before = tree(tmp_path)
    assert "mended" in ask("mended")
    with pytest.raises(SPPOError, match="holds answers to other questions"):
        ask("second")
    assert tree(tmp_path) == before
    assert "second" in ask("second", replace(order, overwrite=True))


# best of n


def test_a_prompt_without_a_best_response_is_counted_and_has_an_entry(
    models: Path, tmp_path: Path, rankers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out of best.alpaca.json, it would be left out of the win rate, and nothing would say so."""
    source = "def picky(prompt, a, b):\n    return float('nan') if 'hard' in prompt else float(len(a) - len(b))\n"
    (tmp_path / "picky.py").write_text(source)
    texts = ["Why 1?", "hard", "Why 2? " * 400, "", "Why 3?"]
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    recipe = Recipe(
        model=str(models / "llama3"), prompts=str(prompts), pairs=3, maxlen=6, engine="transformers",
        ranker="picky:picky", ranker_backend="function", system_prompt="Be brief.",
    )  # fmt: skip
    out = tmp_path / "out"

    def drawn(*_: Any) -> Path:
        generate_shards(recipe, out, [Slice(0, 0)], False)
        return out / "responses.parquet"

    monkeypatch.setattr(best, "draw", drawn)
    monkeypatch.setattr(best, "call", lambda *_: None)
    monkeypatch.setattr(best, "launch", lambda *_: rank_shards(recipe, out, [Slice(0, 0)], False))
    asked = lambda: {p.prompt_id: p.messages for p in load_prompts(recipe.prompts, recipe)}  # noqa: E731 - as the script
    best.best_of_n(recipe, out, False, asked)
    rows = {row["prompt_id"]: row for row in read_rows(out / "best.parquet", ["prompt_id", "response"])}
    entries = read_json(out / "best.alpaca.json")
    assert [entry["instruction"] for entry in entries] == [text for text in texts if text]
    assert len(rows) == 2
    assert [entry["output"] for entry in entries] == [
        rows[key]["response"] if key in rows else "" for key, prompt in asked().items() if prompt
    ]
    assert [bool(entry["output"]) for entry in entries] == [True, False, False, True]
    manifest = read_json(out / "best.manifest.json")
    reasons = {"too long for the model's context": 1, "empty": 1, "the ranker gave no answer": 1}
    assert (manifest["counts"]["prompts"], manifest["counts"]["written"]) == (5, 2)
    assert manifest["counts"]["skipped"] == reasons
    assert {each["prompt_id"] for each in manifest["skipped"]} == set(asked()) - set(rows)

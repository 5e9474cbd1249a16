"""A chat template that writes the day, or has other arguments now: what the policy read is kept and trained on."""

from __future__ import annotations

import datetime
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_reward_model
import tiny
from bad_input import call
from conversations import RATES, USER, answer, ids
from test_agreement import worst_difference
from transformers import AutoTokenizer

from sppo import cli
from sppo.command.errors import SPPOError
from sppo.evaluation.suites import open_llm
from sppo.evaluation.suites.suite import Order
from sppo.generation import shards
from sppo.generation.shards import generate_shards
from sppo.generation.source import Source
from sppo.models import chat, dates, frames
from sppo.models.policy import open_policy, policy_of
from sppo.preflight.generation import check_template
from sppo.rankers import pairrm, reward_model
from sppo.recipe import KEYS, Recipe, load_recipe
from sppo.store.files import read_json, write_json
from sppo.store.journal import Journal
from sppo.store.manifest import OVERWRITE
from sppo.store.shards import Slice, overwriting
from sppo.training.data import load_training_set
from sppo.training.settings import prepare

DATED = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') "
    "+ '<|eot_id|>' }}" + tiny.LLAMA3_TEMPLATE.replace("{% set content = bos_token + content %}", "")
)


@pytest.fixture
def day(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """day(n): today is the n-th of May, for us and for transformers."""
    from transformers.utils import chat_template_utils

    def turn(number: int) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime.datetime:
                return datetime.datetime(2026, 5, number)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        monkeypatch.setattr(dates, "datetime", Clock)
        monkeypatch.setattr("sppo.store.shards.datetime", Clock)

    return turn


@pytest.fixture
def dated(models: Path, tmp_path: Path) -> Path:
    """A model whose template writes the day."""
    model = shutil.copytree(models / "llama3", tmp_path / "dated")
    (model / "chat_template.jinja").write_text(DATED)
    return model


def killed_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine dies when it has drawn for so many prompts."""
    whole = shards.finished_responses

    def some(*args: Any) -> Iterator[Any]:
        yield from itertools.islice(whole(*args), count)
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "finished_responses", some)


def prompts_file(tmp_path: Path) -> Path:
    return tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"Why {n}?", "prompt_id": str(n)} for n in range(6)])


def generating(model: Path, prompts: Path, out: Path, *flags: str) -> list[str]:
    """scripts/generate.py by hand."""
    words = [f"--model={model}", f"--prompts={prompts}", f"--output_dir={out}", "--pairs=2", "--maxlen=4"]
    return ["scripts/generate.py", *words, "--engine=transformers", *flags]


def days_of(responses: Path, model: Path) -> Counter[str]:
    """The days in the prompts that the responses were drawn from."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = pq.read_table(responses).to_pylist()
    return Counter(tokenizer.decode(row["prompt_token_ids"]).partition("Today: ")[2][:2] for row in rows)


def start(command: list[str], stop_after: int | None = None) -> tuple[int, str]:
    """(exit code, what was said) of the command's own main, killed when it has drawn for so many prompts."""
    with pytest.MonkeyPatch.context() as patch:
        if stop_after is not None:
            killed_after(stop_after, patch)
        return call(command, {})


def test_a_shard_goes_on_the_next_day_with_the_day_that_it_began_on(
    dated: Path, tmp_path: Path, day: Callable[[int], None]
) -> None:
    """Killed in its middle on one day and started again on the next: 63 prompts had the other day's ids, once.

    The responses are those of a run that was not killed, for each prompt its ids are those it was drawn from, and the
    ids are the template's of the first day.
    """
    prompts = prompts_file(tmp_path)
    day(1)
    assert start(generating(dated, prompts, tmp_path / "whole"))[0] == 0
    assert start(generating(dated, prompts, tmp_path / "data"), 3)[0] == 130
    day(2)
    code, said = start(generating(dated, prompts, tmp_path / "data"))
    assert (code, "3 to do, 3 in the journal" in said, "the date is 2026-05-01" in said) == (0, True, True), said
    found, expected = (pq.read_table(tmp_path / name / "responses.parquet") for name in ("data", "whole"))
    assert found.drop(["responses"]) == expected.drop(["responses"])
    assert [[r["token_ids"] for r in row] for row in found["responses"].to_pylist()] == [
        [r["token_ids"] for r in row] for row in expected["responses"].to_pylist()
    ]
    assert days_of(tmp_path / "data" / "responses.parquet", dated) == {"01": 6}
    assert worst_difference(tmp_path / "data" / "responses.parquet", dated) < 2e-5
    assert start(generating(dated, prompts, tmp_path / "data"))[0] == 0  # the day decides nothing: it is done


def test_another_date_is_refused_in_the_middle_of_a_shard(
    dated: Path, tmp_path: Path, day: Callable[[int], None]
) -> None:
    prompts = prompts_file(tmp_path)
    day(1)
    assert start(generating(dated, prompts, tmp_path / "data"), 3)[0] == 130
    code, said = start(generating(dated, prompts, tmp_path / "data", "--date=2026-05-02"))
    assert (code, 'settings.date: "2026-05-01" there, "2026-05-02" now' in said) == (1, True), said
    day(2)
    assert start(generating(dated, prompts, tmp_path / "data", "--date=2026-05-01"))[0] == 0
    assert days_of(tmp_path / "data" / "responses.parquet", dated) == {"01": 6}
    assert start(generating(dated, prompts, tmp_path / "data", "--overwrite"))[0] == 0
    assert days_of(tmp_path / "data" / "responses.parquet", dated) == {"02": 6}  # made anew, today


def test_shards_that_begin_on_different_days_have_the_first_ones_date(
    dated: Path, tmp_path: Path, day: Callable[[int], None]
) -> None:
    """On a cluster the second shard may wait in a queue until the next day; the shards would not fit together."""
    prompts = prompts_file(tmp_path)
    for number in range(2):
        day(1 + number)
        flags = ("--numgpu=2", f"--data_frac={number}")
        assert start(generating(dated, prompts, tmp_path / "data", *flags))[0] == 0
    words = ["scripts/combine_generate.py", f"--output_dir={tmp_path / 'data'}", "--numgpu=2", "--pairs=2"]
    code, said = call(words, {})
    assert code == 0, said
    assert days_of(tmp_path / "data" / "responses.parquet", dated) == {"01": 6}


def test_an_overwrite_goes_on_the_next_day_with_its_own(
    dated: Path, tmp_path: Path, day: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed overnight, it deleted the shards that it had made already. And shards of two days do not fit together."""
    prompts, out = prompts_file(tmp_path), tmp_path / "data"
    shards = [generating(dated, prompts, out, "--numgpu=2", f"--data_frac={number}") for number in range(2)]
    day(1)
    assert [start(command)[0] for command in shards] == [0, 0]
    day(2)
    name, _ = overwriting(out / "responses", 2, 2)  # as the launcher begins it, and goes on with it
    monkeypatch.setenv(OVERWRITE, name)
    assert start([*shards[0], "--overwrite"])[0] == 0
    made = out / "responses" / "shard-00000.parquet"
    stamp = made.stat().st_mtime_ns
    day(3)
    assert overwriting(out / "responses", 2, 2)[0] == name
    assert [start([*command, "--overwrite"])[0] for command in shards] == [0, 0]
    assert made.stat().st_mtime_ns == stamp
    code, said = call(["scripts/combine_generate.py", f"--output_dir={out}", "--pairs=2"], {})
    assert (code, days_of(out / "responses.parquet", dated)) == (0, {"02": 6}), said


@pytest.mark.parametrize("template", [DATED.replace("strftime_now('%d %b %Y')", "date_string"), tiny.LLAMA3_TEMPLATE])
def test_a_template_that_writes_no_day_goes_on_whatever_the_day_and_the_date(
    dated: Path, tmp_path: Path, day: Callable[[int], None], template: str
) -> None:
    """Its work would be refused for nothing. A date_string of --chat_template_kwargs is not ours to change."""
    (dated / "chat_template.jinja").write_text(f"{template}{{# strftime_now #}}")
    flags = ['--chat_template_kwargs={"date_string": "26 Jul 2024"}'] if "date_string" in template else []
    prompts, out = prompts_file(tmp_path), tmp_path / "data"
    day(1)
    assert start(generating(dated, prompts, out, *flags), 3)[0] == 130
    stage = Source.of(cli.parse(cli.chain_parser("", KEYS["generate"]), generating(dated, prompts, out, *flags)[1:])[1])
    assert "date" not in stage.stage(out, Slice(0, 0)).identity["settings"]
    day(2)
    code, said = start(generating(dated, prompts, out, *flags, "--date=2026-05-09"))
    assert (code, "3 to do" in said, "the date is" in said) == (0, True, False), said
    assert set(days_of(out / "responses.parquet", dated)) == ({"26"} if flags else {""})


def test_work_of_an_older_version_goes_on_as_it_did(
    dated: Path, tmp_path: Path, day: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifests and journals name no date: it goes on, today's date each time, and each row keeps its own ids."""
    prompts, out = prompts_file(tmp_path), tmp_path / "data"
    day(1)
    with monkeypatch.context() as older:
        older.setattr(shards, "as_begun", lambda recipe, *_: recipe)
        assert start(generating(dated, prompts, out), 3)[0] == 130
    day(2)
    code, said = start(generating(dated, prompts, out, "--date=2026-05-01"))
    assert (code, 'settings.date: null there, "2026-05-01" now' in said) == (1, True), said
    code, said = start(generating(dated, prompts, out))
    assert code == 0, said
    assert days_of(out / "responses.parquet", dated) == {"01": 3, "02": 3}
    assert worst_difference(out / "responses.parquet", dated) < 2e-5
    day(3)
    assert start(generating(dated, prompts, out))[0] == 0


def driver(model: Path, prompts: Path, run: Path, *flags: str) -> list[str]:
    words = ["scripts/plan.py", f"--model={model}", f"--prompts={prompts}", f"--run_dir={run}", "--iterations=3"]
    words += ["--recipe=recipes/sppo/demo.yaml", "--ranker=tiny:longer", "--gpus=none", "--skip_preflight"]
    return [*words, *flags]


def dates_of(run: Path) -> list[str]:
    return [load_recipe(run / f"iter{number}" / "recipe.yaml").date for number in (1, 2, 3)]


def test_a_driver_fixes_the_date_at_the_first_start_for_all_iterations(
    dated: Path, tmp_path: Path, day: Callable[[int], None]
) -> None:
    """Each iteration would have another day's prompts, and one that is resumed overnight two days'."""
    command = driver(dated, prompts_file(tmp_path), tmp_path / "run")
    for number in (1, 2):
        day(number)
        code, said = call(command, {})
        assert code == 0, said
        assert dates_of(tmp_path / "run") == ["2026-05-01"] * 3
    step = ["scripts/generate.py", f"--recipe={tmp_path / 'run' / 'iter1' / 'recipe.yaml'}", "--maxlen=4", "--pairs=2"]
    assert start([*step, "--engine=transformers"])[0] == 0  # on the second day
    assert days_of(tmp_path / "run" / "iter1" / "data" / "responses.parquet", dated) == {"01": 6}
    assert call([*command, "--date=2024-02-29", f"--run_dir={tmp_path / 'other'}"], {})[0] == 0
    assert dates_of(tmp_path / "other") == ["2024-02-29"] * 3


def test_a_run_of_an_older_version_gets_no_date(dated: Path, tmp_path: Path, day: Callable[[int], None]) -> None:
    """Its recipe names none. With one, what is made in it would be refused as work of another date."""
    run, prompts = tmp_path / "run", prompts_file(tmp_path)
    assert call(driver(dated, prompts, run), {})[0] == 0
    path = run / "iter1" / "recipe.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("date:")))
    day(2)
    assert call(driver(dated, prompts, run), {})[0] == 0
    assert dates_of(run) == [""] * 3


@pytest.mark.parametrize("wrong", ["2026-13-01", "2026-02-30", "1 May 2026", "20260501", "2026-05-01T00:00", "today"])
def test_a_wrong_date_is_one_clear_error(tmp_path: Path, wrong: str) -> None:
    code, said = call(generating(tmp_path / "m", tmp_path / "p.jsonl", tmp_path / "data", f"--date={wrong}"), {})
    assert (code, "as YYYY-MM-DD" in said, "Traceback" in said) == (2, True, False), said


def test_a_date_in_yaml_needs_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("date: 2026-05-01\n")
    assert load_recipe(tmp_path / "r.yaml").date == "2026-05-01"


def test_rankers_read_prompts_as_of_the_same_date(
    models: Path, dated: Path, tmp_path: Path, day: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's template around PairRM's prompt, and the reward model's own: its rewards changed overnight."""
    day(2)
    recipe = Recipe(model=str(dated), ranker=str(models / "PairRM"), date="2026-05-01")
    assert "Today: 01 May 2026" in pairrm.prompt_renderer(recipe)([USER])
    assert pairrm.identity(recipe)["date"] == "2026-05-01"
    assert "date" not in pairrm.identity(replace(recipe, date=""))
    assert "date" not in pairrm.identity(replace(recipe, ranker_prompt="text"))
    assert "date" not in pairrm.identity(replace(recipe, model=str(models / "llama3")))

    reward = test_reward_model.make(tmp_path / "reward", "llama")
    recipe = Recipe(ranker=str(reward), ranker_backend="reward-model", date="2026-05-01")
    assert "date" not in reward_model.identity(recipe)
    (reward / "chat_template.jinja").write_text(DATED)
    assert reward_model.identity(recipe)["date"] == "2026-05-01"
    assert "date" not in reward_model.identity(replace(recipe, date=""))
    pair = ([USER], "It is.", "No!")
    found = [dict(reward_model.load(replace(recipe, date=date)).logits([pair]))[0] for date in ("2026-05-01", "")]
    day(1)
    today = dict(reward_model.load(replace(recipe, date="")).logits([pair]))[0]
    assert found[0] == today != found[1]


def test_a_ranking_by_hand_takes_the_date_that_the_policy_read(
    models: Path, dated: Path, tmp_path: Path, day: Callable[[int], None]
) -> None:
    """And goes on with it the next day."""
    out = tmp_path / "data"
    day(1)
    assert start(generating(dated, prompts_file(tmp_path), out))[0] == 0
    words = ["scripts/rank.py", f"--output_dir={out}", f"--ranker={models / 'PairRM'}", "--pairs=2"]
    for number in (2, 3):
        day(number)
        code, said = call(words, {})
        assert code == 0, said
    asked = read_json(out / "ranking" / "shard-00000.manifest.json")["inputs"]["ranker"]
    assert asked["date"] == "2026-05-01"


def test_a_row_without_token_ids_is_trained_on_as_of_the_date(
    models: Path, dated: Path, tmp_path: Path, day: Callable[[int], None]
) -> None:
    """Another tool's data: the template is applied in training. A killed training goes on with its day's prompts."""
    pq.write_table(pa.Table.from_pylist([{"chosen": [USER, answer("a")], "rejected": [USER, answer("b")], **RATES}]),
                   tmp_path / "t.parquet")  # fmt: skip
    recipe = Recipe(model=str(dated), dataset=str(tmp_path / "t.parquet"), model_dir=str(tmp_path / "out" / "model"))
    day(1)
    asked = prepare(recipe, 1)
    assert asked.stage.settings["date"] == "2026-05-01"
    tokenizer = asked.source.tokenizer()
    day(2)
    data = load_training_set(asked.dataset, tokenizer, asked.source.stop_ids(tokenizer), asked.recipe)
    assert "Today: 01 May 2026" in tokenizer.decode(ids(data)[0][0][0])
    write_json(asked.work / "identity.json", asked.stage.identity)  # killed while it trained
    assert prepare(recipe, 1).stage.settings["date"] == "2026-05-01"
    with pytest.raises(SPPOError, match='settings.date: "2026-05-01" there, "2026-05-02" now'):
        prepare(replace(recipe, date="2026-05-02"), 1).refuse_others()
    write_json(asked.work / "identity.json", {**asked.stage.identity, "settings": {}})  # an older version's
    assert "date" not in prepare(recipe, 1).stage.settings
    assert "date" not in prepare(replace(recipe, model=str(models / "llama3"), date="2026-05-02"), 1).stage.settings


MACRO = "{% macro head() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ head() }}"


@pytest.mark.parametrize(
    ("template", "writes"),
    [
        (DATED, True),
        (MACRO + tiny.LLAMA3_TEMPLATE, True),
        ("{% if messages[0]['role'] != 'system' %}{{ strftime_now('%A') }}{% endif %}" + tiny.LLAMA3_TEMPLATE, True),
        (
            "{% if messages[0]['role'] == 'system' %}{{ strftime_now('%d')|int }}{% endif %}" + tiny.LLAMA3_TEMPLATE,
            True,
        ),
        ("{% if tools %}{{ strftime_now('%d') }}{% endif %}" + tiny.LLAMA3_TEMPLATE, False),
        ("{% if strftime_now is defined %}{% set day = '26 Jul' %}{% endif %}" + tiny.LLAMA3_TEMPLATE, False),
        (tiny.LLAMA3_TEMPLATE, False),
    ],
    ids="plain macro no_system system tools guarded none".split(),
)
def test_whether_a_template_writes_the_day_is_asked_of_the_template(
    models: Path, day: Callable[[int], None], template: str, writes: bool
) -> None:
    """Mistral-Small's writes it only where there is no system turn, gpt-oss's in a macro, others behind a condition."""
    tokenizer = chat.load_tokenizer(models / "llama3", date="2024-02-29")
    tokenizer.chat_template = template
    assert frames.writes_date(tokenizer, {}) == writes
    if writes:
        conversations = [[USER], [{"role": "system", "content": "Be brief."}, USER]]
        day(1)
        before = [chat.render(tokenizer, messages, True) for messages in conversations]
        day(2)
        assert [chat.render(tokenizer, messages, True) for messages in conversations] == before
        dates.fix_date(tokenizer, "")
        assert [chat.render(tokenizer, messages, True) for messages in conversations] != before


@pytest.mark.slow
def test_lm_eval_asks_in_the_template_as_of_the_date(dated: Path, tmp_path: Path, day: Callable[[int], None]) -> None:
    """It applies the template itself, for the second leaderboard."""
    pytest.importorskip("lm_eval")
    day(2)
    recipe = Recipe(model=str(dated), date="2026-05-01", engine="transformers")
    order = Order("open_llm", recipe, tmp_path, leaderboard=2)
    policy = policy_of(recipe)
    assert "Today: 01 May 2026" in open_llm._engine(order, policy).apply_chat_template([USER])
    assert open_llm.tasks_stage(order, policy, ["a"]).settings["date"] == "2026-05-01"
    assert "date" not in open_llm.tasks_stage(replace(order, leaderboard=1), policy, ["a"]).settings


def test_two_recipes_in_one_process_keep_their_dates(dated: Path) -> None:
    """The date is the tokenizer's own: a second recipe's would replace the first one's in a global."""
    first, second = (policy_of(Recipe(model=str(dated), date=f"2026-05-0{n}")).tokenizer() for n in (1, 2))
    assert ["01 May" in chat.render(t, [USER], True) for t in (first, second, first)] == [True, False, True]


def test_a_journal_without_what_the_policy_read_is_refused(models: Path, tmp_path: Path) -> None:
    """An older version's: the template may make other token ids of the prompt today."""
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Why?", "prompt_id": "p"}])
    recipe = Recipe(model=str(models / "llama3"), prompts=str(prompts), pairs=2, maxlen=4, engine="transformers")
    stage = Source.of(recipe).stage(tmp_path, Slice(0, 0))
    journal = Journal(stage.journal, stage.identity)
    journal.add("p", {"responses": [{"text": "kept", "token_ids": [50, 51], "finish_reason": "length"}] * 2})
    journal.close()
    with pytest.raises(SPPOError, match="shard-00000.journal is of an older version; move it away"):
        generate_shards(recipe, tmp_path, [Slice(0, 0)], False)


@pytest.mark.parametrize(
    ("template", "kwargs", "says"),
    [
        (DATED, {}, True),
        (DATED.replace("strftime_now('%d %b %Y')", "(day or strftime_now('%d'))"), {"day": "1 May"}, False),
        (tiny.LLAMA3_TEMPLATE, {}, False),
    ],
)
def test_the_preflight_says_where_a_template_writes_the_day(
    models: Path, tmp_path: Path, template: str, kwargs: dict[str, str], says: bool
) -> None:
    model = shutil.copytree(models / "llama3", tmp_path / "dated")
    (model / "chat_template.jinja").write_text(template)
    for date, told in (("2026-05-01", "2026-05-01 in all of the run"), ("", "differ from day to day")):
        policy = open_policy(str(model), date=date)
        found = check_template(policy, policy.tokenizer(), kwargs)
        assert any(told in finding.text for finding in found) == says


WITH_DEFAULT = (  # as Qwen-2.5: a system turn of the template's own where a conversation has none
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}" + tiny.QWEN3_TEMPLATE
)
HEAR = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is it None? Say all."}]
SAID = [*HEAR[1:], answer("It is."), {"role": "user", "content": "Is it?"}]
THINK = {"enable_thinking": False}


def prompts_of_a_row(
    tokenizer: Any, path: Path, drawn: list[int], edited: list[dict[str, str]], kwargs: dict[str, Any]
) -> tuple[list[list[int]], dict[str, int]]:
    """The trained prompts of a row that was drawn for `drawn` and whose conversation is now `edited`; the counts."""
    end = tokenizer.eos_token_id
    said = [{"text": t, "token_ids": [*tokenizer(t, add_special_tokens=False)["input_ids"], end]} for t in ("a", "b")]
    row = {"chosen": [*edited, answer("a")], "rejected": [*edited, answer("b")], "prompt": edited, **RATES}
    row |= {"responses": said, "chosen_index": 0, "rejected_index": 1, "prompt_token_ids": drawn}
    pq.write_table(pa.Table.from_pylist([{**row, "tokenizer": chat.tokenizer_identity(tokenizer)}]), path)
    data = load_training_set(path, tokenizer, {end}, Recipe(chat_template_kwargs=kwargs))
    assert [r for _, r in ids(data)[0]] == [r["token_ids"] for r in said]
    return [p for p, _ in ids(data)[0]], data.counts


EDITS = [
    lambda turns: [*turns[:-1], {**turns[-1], "content": turns[-1]["content"][:-4]}],  # shorter at the end
    lambda turns: [*turns[:-1], {**turns[-1], "content": turns[-1]["content"][4:]}],  # at the start
    lambda turns: [*turns[:-1], {**turns[-1], "content": f"{turns[-1]['content']} Now"}],
    lambda turns: [*turns[:-1], {**turns[-1], "content": ""}],
    lambda turns: [*turns, answer("yes"), USER],
    lambda turns: turns[1:] or [USER],  # a turn less, the system's or the first
    lambda turns: turns[-1:] if len(turns) > 2 else [USER],
    lambda turns: [answer(turns[0]["content"]), *turns[1:]],
]


@pytest.mark.parametrize(
    ("template", "drawn_with", "now_with"),
    [
        (None, THINK, {}),
        (None, {}, THINK),
        (WITH_DEFAULT, THINK, {}),
        (DATED, {}, {}),
        (DATED.replace("strftime_now('%d %b %Y')", "strftime_now(format='%A, %d.%m.')"), {}, {}),
        (DATED.replace("strftime_now('%d %b %Y')", "(day or strftime_now('%d %b'))"), {"day": "1 May"}, {}),
        (DATED.replace("strftime_now('%d %b %Y')", "(day or strftime_now('%d %b'))"), {}, {"day": "1 May"}),
    ],
)
@pytest.mark.parametrize("turns", [HEAR, HEAR[1:], SAID], ids=["system", "one", "several"])
def test_what_the_policy_read_trains_whatever_the_template_would_write_now(
    models: Path,
    tmp_path: Path,
    day: Callable[[int], None],
    template: str | None,
    drawn_with: dict[str, Any],
    now_with: dict[str, Any],
    turns: list[dict[str, str]],
) -> None:
    tokenizer = chat.load_tokenizer(models / ("llama3" if template and "start_header" in template else "qwen3"))
    tokenizer.chat_template = template or tokenizer.chat_template
    day(1)
    drawn = chat.prompt_ids(tokenizer, turns, drawn_with)
    day(2)
    assert chat.prompt_ids(tokenizer, turns, now_with) != drawn
    assert frames.reads_as(tokenizer, drawn, turns, now_with)
    for number, change in enumerate(EDITS):
        assert not frames.reads_as(tokenizer, drawn, change(turns), now_with), number
    prompts, counts = prompts_of_a_row(tokenizer, tmp_path / "t.parquet", drawn, turns, now_with)
    assert (prompts, counts["rows_from_generated_ids"]) == ([drawn] * 2, 1)
    edited = EDITS[0](turns)
    prompts, counts = prompts_of_a_row(tokenizer, tmp_path / "t.parquet", drawn, edited, now_with)
    assert (prompts, counts["rows_edited"]) == ([chat.prompt_ids(tokenizer, edited, now_with)] * 2, 1)

"""--extra_responses: answers of other models join the tournament, with token ids, from the file to the training."""

from __future__ import annotations

import datetime
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from bad_input import call
from test_doctor import examined as examined_by
from test_doctor import flags_of, only_no
from test_template_dates import DATED
from transformers.utils import chat_template_utils

from sppo import iterations
from sppo.command.errors import SPPOError
from sppo.evaluation import answers
from sppo.evaluation.page.gather import gather
from sppo.generation.combine import combine, combine_stage
from sppo.generation.extras import Answer, Extras, Templater
from sppo.generation.shards import generate_shards
from sppo.hub.data_card import data_card
from sppo.hub.push import _write_generated
from sppo.models.policy import open_policy
from sppo.pairing.training_set import compute_prob
from sppo.ranking.shards import rank_shards
from sppo.recipe import Recipe
from sppo.store.files import read_json, write_json
from sppo.store.manifest import Stage
from sppo.store.parquet import read_rows
from sppo.store.shards import Slice
from sppo.training.data import load_training_set

K, E, N = 2, 2, 5
LONG = "It is blue because it scatters, and that is all there is to say about it."  # longer than any drawn response


def answers_of(prompt_id: str) -> list[str]:
    return [f"{LONG} ({prompt_id})", f"no {prompt_id}"]


def one_a_row(ids: list[str]) -> list[dict[str, str]]:
    return [{"prompt_id": i, "response": text} for i in ids for text in answers_of(i)]


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> Recipe:
    """K = 2 of 5 prompts, one with a system turn, and of one that is empty; E = 2, also for a prompt of another run."""
    rows: list[dict[str, Any]] = [{"prompt_id": f"p{n}", "prompt": f"Why is {n} blue?"} for n in range(N)]
    rows[1]["system"] = "Be brief."
    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl", [*rows, {"prompt_id": "empty", "prompt": ""}])
    file = tiny.write_jsonl(tmp_path / "extra.jsonl", one_a_row([f"p{n}" for n in [4, 0, 2, 1, 3]] + ["another run's"]))
    return Recipe(
        model=str(models / "llama3"), prompts=str(prompts), extra_responses=str(file), pairs=K, maxlen=6,
        engine="transformers", temperature=1.0, ranker="tiny:longer", estimator="paper",
    )  # fmt: skip


def drawn(recipe: Recipe, out: Path, shards: int = 1) -> list[dict[str, Any]]:
    for i in range(shards):
        generate_shards(recipe, out, [Slice(0, i, shards)], False)
    if shards > 1:
        combine(out, shards, recipe.pairs, False, recipe=recipe)
    return pq.read_table(out / "responses.parquet").to_pylist()


# the file


def as_parquet(path: Path, ids: list[str]) -> Path:
    """As another run's responses.parquet: records with a text and more."""
    rows = [{"prompt_id": i, "responses": [{"text": t, "token_ids": [1]} for t in answers_of(i)]} for i in ids]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_csv(path: Path, ids: list[str]) -> Path:
    lines = [f'{i},"{text}"' for i in ids for text in answers_of(i)]
    path.write_text("\n".join(["prompt_id,response", *lines]))
    return path


def as_lists(path: Path, ids: list[str]) -> Path:
    return tiny.write_jsonl(path, [{"prompt_id": i, "responses": answers_of(i)} for i in ids])


def as_rows(path: Path, ids: list[str]) -> Path:
    return tiny.write_jsonl(path, one_a_row(ids))


@pytest.mark.parametrize(
    ("name", "write"), [("e.parquet", as_parquet), ("e.csv", as_csv), ("l.jsonl", as_lists), ("r.jsonl", as_rows)]
)
def test_each_kind_of_file_has_the_same_answers(tmp_path: Path, name: str, write: Callable[..., Path]) -> None:
    ids = ["7", "b", "c"]
    extras = Extras(str(write(tmp_path / name, ids)))
    assert extras.answers == {i: [Answer(text) for text in answers_of(i)] for i in ids}
    assert extras.each(ids) == extras.each(["b"]) == E
    assert extras.each([]) == 0  # a part of the prompts in which all are skipped


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "p0", "response": "a"}], "without the columns prompt_id, and response or responses"),
        ([{"prompt_id": "p0", "answer": "a"}], "without the columns prompt_id, and response or responses"),
        ([{"prompt_id": None, "response": "a"}], "a row without a prompt_id"),
        ([{"prompt_id": "p0", "response": None}], "prompt p0 has an answer that is no text"),
        ([{"prompt_id": "p0", "response": 7}], "prompt p0 has an answer that is no text"),
        ([{"prompt_id": "p0", "response": "\ud800"}], "prompt p0 has an answer that is no text"),
        ([{"prompt_id": "p0", "responses": "two of them"}], "prompt p0 has an answer that is no text"),
        ([{"prompt_id": "p0", "responses": ["a", {"content": "b"}]}], "prompt p0 has an answer that is no text"),
        ([{"prompt_id": "p0", "response": "a", "responses": ["b"]}], "p0 has both response and responses; keep one"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SPPOError, match=f"--extra_responses .*{message}"):
        Extras(str(path))


def test_a_file_that_is_not_there_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SPPOError, match="nowhere.jsonl: no such file"):
        Extras(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "e.txt").write_text("a")
    with pytest.raises(SPPOError, match=r"should end in \.parquet, \.jsonl or \.csv"):
        Extras(str(tmp_path / "e.txt"))


def test_prompts_without_answers_are_counted_and_named(tmp_path: Path) -> None:
    extras = Extras(str(tiny.write_jsonl(tmp_path / "e.jsonl", one_a_row(["a", "b"]) + one_a_row(["b"]))))
    with pytest.raises(
        SPPOError, match=r"8 of 10 prompts have none \(q0, .*q4, \.\.\.\); 1 of 10 prompts have 2 \(a\)"
    ):
        extras.each(["a", "b", *[f"q{n}" for n in range(8)]])
    with pytest.raises(SPPOError, match=r"1 of 2 prompts have 2 \(a\); 1 of 2 prompts have 4 \(b\)"):
        extras.each(["a", "b"])
    with pytest.raises(SPPOError, match=r"2 of 2 prompts have none \(x, y\)$"):
        extras.each(["x", "y"])


# the responses


@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma2", "qwen3"])
def test_the_token_ids_are_the_templates_and_end_once(models: Path, family: str) -> None:
    """Against the whole conversation as transformers renders it: what stands between the prompt and the end's end."""
    policy = open_policy(str(models / family))
    tokenizer = policy.tokenizer()
    stops = policy.stop_ids(tokenizer)
    prompt = [{"role": "user", "content": "Why?"}]
    end = tokenizer.decode(sorted(stops)[:1])
    for answer in (LONG, f"{LONG}{end}"):  # as some data sets hold it
        made = Templater(tokenizer, stops, {}).response(prompt, Answer(answer))
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        after = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": LONG}], tokenize=False)
        assert made["text"] == LONG
        assert made["token_ids"][-1] in stops
        assert not set(made["token_ids"][:-1]) & stops
        assert after[len(before) :].startswith(tokenizer.decode(made["token_ids"]))
        assert tokenizer.decode(made["token_ids"], skip_special_tokens=True) == LONG
        assert (made["finish_reason"], made["logps"]) == ("stop", None)


def test_a_template_without_an_end_gets_the_tokenizers(models: Path) -> None:
    """Else it would be trained to go on for ever after another model's answer."""
    policy = open_policy(str(models / "llama3"))
    tokenizer = policy.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    templater, prompt = Templater(tokenizer, {3, 5, tokenizer.eos_token_id}, {}), [{"role": "user", "content": "Q"}]
    plain = tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert templater.response(prompt, Answer("yes"))["token_ids"] == [*plain, tokenizer.eos_token_id]
    assert templater.response(prompt, Answer("yes", is_cut=True))["token_ids"] == plain


def test_they_stand_behind_what_was_drawn_however_the_shards_are_cut(recipe: Recipe, tmp_path: Path) -> None:
    alone = drawn(replace(recipe, extra_responses=""), tmp_path / "alone")
    one, three = drawn(recipe, tmp_path / "one"), drawn(recipe, tmp_path / "three", 3)
    assert one == three
    assert len(one) == N
    for row, without in zip(one, alone, strict=True):
        assert row["responses"][:K] == without["responses"]  # nothing that was drawn has changed
        assert [r["text"] for r in row["responses"][K:]] == answers_of(row["prompt_id"])
        assert {**row, "responses": []} == {**without, "responses": []}
    mine, its = (read_json(tmp_path / name / "responses.manifest.json") for name in ("one", "alone"))
    counts = {"extra_responses": N * E, "extra_responses_each": E, "extra_responses_cut": 0}
    assert mine["counts"] == {**its["counts"], **counts, "extra_responses_with_an_end_within": 0}
    assert set(mine["inputs"]) - set(its["inputs"]) == {"extra_responses"}
    assert mine["settings"] == its["settings"]


def test_an_answer_that_was_cut_gets_no_end(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another run's responses.parquet says which are. The policy was trained to end in the middle of a sentence."""
    other = drawn(replace(recipe, extra_responses="", seed=7, maxlen=4), tmp_path / "other")
    file = tmp_path / "other" / "responses.parquet"
    rows = drawn(replace(recipe, extra_responses=str(file)), tmp_path / "out")
    stops = open_policy(recipe.model).stop_ids(open_policy(recipe.model).tokenizer())
    cut = 0
    for row, theirs in zip(rows, other, strict=True):
        for mine, its in zip(row["responses"][K:], theirs["responses"], strict=True):
            is_cut = its["finish_reason"] == "length" and bool(its["text"].strip())
            assert (mine["finish_reason"], mine["token_ids"][-1] in stops) == (
                ("length", False) if is_cut else ("stop", True)
            )
            cut += is_cut
    assert cut > N  # of 2 N
    assert read_json(tmp_path / "out" / "responses.manifest.json")["counts"]["extra_responses_cut"] == cut
    assert "warning" not in capsys.readouterr().out


def test_an_answer_that_spells_the_end_of_its_turn_is_counted(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind its middle it may hold a turn of the user, which the policy learns to write."""
    forged = "Yes.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
    texts = [forged, "Yes.<|eot_id|>"]
    file = tiny.write_jsonl(tmp_path / "e.jsonl", [{"prompt_id": f"p{n}", "responses": texts} for n in range(N)])
    drawn(replace(recipe, extra_responses=str(file)), tmp_path / "out")
    counts = read_json(tmp_path / "out" / "responses.manifest.json")["counts"]
    assert counts["extra_responses_with_an_end_within"] == N
    assert f"{N} answers spell an end of turn within their text" in capsys.readouterr().out


def test_answers_to_other_prompts_under_the_same_ids_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    """Rows numbered from 0 in two data sets. Where the file has the prompts, it can be known."""
    rows = [{"prompt_id": f"p{n}", "responses": answers_of(f"p{n}")} for n in range(N)]
    asked = [f"Why is {n} blue?" for n in range(N)]

    def with_prompts(prompts: list[Any]) -> Recipe:
        whole = [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]
        return replace(recipe, extra_responses=str(tiny.write_jsonl(tmp_path / "e.jsonl", whole)))

    # in another model's template, with a system prompt folded into it, or as messages it is the same prompt
    templated = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in asked]
    folded = [[{"role": "user", "content": f"Be brief.\n\n{text} "}] for text in asked]
    lines = [text.replace(" ", "\r\n") for text in asked]  # as a CSV file may have them
    for number, prompts in enumerate((asked, templated, folded, lines, [None] * N, [[]] * N, [7] * N)):
        drawn(with_prompts(prompts), tmp_path / f"same{number}")

    out = tmp_path / "out"
    other = with_prompts([*asked[:-1], "Name three rivers."])
    with pytest.raises(SPPOError, match=r"its prompt p4 is 'Name three rivers\.', and the run's is 'Why is 4 blue\?'"):
        drawn(other, out)
    assert not list(out.glob("responses/*"))  # before anything is drawn
    drawn(recipe, out)
    before = tiny.contents(out)
    with pytest.raises(SPPOError, match="its prompt p4"):
        combine(out, 1, K, True, recipe=other)
    assert tiny.contents(out) == before


def test_answers_are_templated_as_of_the_day_of_the_drawing(
    recipe: Recipe, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The day may turn between a prompt and the same prompt with its answer, which then were not one's beginning."""
    model = shutil.copytree(models / "llama3", tmp_path / "dated")
    (model / "chat_template.jinja").write_text(DATED)
    recipe, out = replace(recipe, model=str(model), extra_responses=""), tmp_path / "out"
    drawn(recipe, out)
    days = iter(range(1, 10_000))

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime(2026, 5, 1) + datetime.timedelta(next(days))

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    (out / "responses.manifest.json").unlink()
    (out / "responses.parquet").unlink()
    file = tiny.write_jsonl(tmp_path / "e.jsonl", one_a_row([f"p{n}" for n in range(N)]))
    combine(out, 1, K, False, recipe=replace(recipe, extra_responses=str(file)))


def test_a_changed_file_is_noticed_and_a_missing_one_costs_no_drawn_response(recipe: Recipe, tmp_path: Path) -> None:
    out, file = tmp_path / "out", Path(recipe.extra_responses)
    drawn(recipe, out)
    before = tiny.contents(out)
    drawn(recipe, out)  # done
    assert tiny.contents(out) == before
    assert combine_stage(out, 1, K, str(file)).is_current()

    text = file.read_text()
    file.write_text(text.replace("scatters", "glows"))
    for asked in (recipe, replace(recipe, extra_responses="")):
        with pytest.raises(SPPOError, match=r"combine: (.|\n)*inputs\.extra_responses(.|\n)*--overwrite"):
            combine(out, 1, K, False, recipe=asked)
    assert tiny.contents(out) == before
    file.write_text("".join(text.splitlines(keepends=True)[2:]))  # p4 has none
    with pytest.raises(SPPOError, match=r"1 of 5 prompts have none \(p4\)"):
        combine(out, 1, K, True, recipe=recipe)
    assert tiny.contents(out) == before  # --overwrite deletes nothing for an error
    file.unlink()
    with pytest.raises(SPPOError, match="no such file"):
        combine(out, 1, K, False, recipe=recipe)
    file.write_text(text.replace("scatters", "glows"))
    combine(out, 1, K, True, recipe=recipe)
    assert "glows" in pq.read_table(out / "responses.parquet").to_pylist()[0]["responses"][K]["text"]


def test_a_tokenizer_of_another_model_is_refused(recipe: Recipe, models: Path, tmp_path: Path) -> None:
    """By hand, combine_generate.py with another --model would write token ids that the policy reads as other text."""
    out = tmp_path / "out"
    for i in range(2):
        generate_shards(recipe, out, [Slice(0, i, 2)], False)
    with pytest.raises(SPPOError, match="mistral has another tokenizer than the model that drew .*pass --model"):
        combine(out, 2, K, False, recipe=replace(recipe, model=str(models / "mistral")))
    assert not (out / "responses.parquet").exists()
    combine(out, 2, K, False, recipe=replace(recipe, model=""))  # the shards name theirs
    assert (out / "responses.parquet").exists()


# the tournament, and what is made of it


def test_the_whole_chain_on_the_command_line(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K + E are ranked, win rates are means over K + E, and another model's answer is chosen, with its token ids."""
    monkeypatch.setenv("PYTHONPATH", str(Path(tiny.__file__).parent))
    out = tmp_path / "run" / "iter1" / "data"
    common = [f"--output_dir={out}", f"--pairs={K}", f"--model={recipe.model}", f"--ranker={recipe.ranker}"]
    common += [f"--extra_responses={recipe.extra_responses}", "--estimator=auto"]
    tiny.succeed("scripts/generate.py", *common, f"--prompts={recipe.prompts}", "--maxlen=6", "--engine=transformers")
    assert "--extra_responses" in tiny.succeed("scripts/combine_generate.py", "--help").split("other scripts")[0]
    tiny.succeed("scripts/combine_generate.py", *common)  # done already
    tiny.succeed("scripts/rank.py", *common)
    tiny.succeed("scripts/compute_prob.py", *common)

    rows = pq.read_table(out / "train.parquet").to_pylist()
    assert len(rows) == N
    for row in rows:
        texts = [r["text"] for r in row["responses"]]
        assert len(texts) == K + E == len(row["probability"]) == len(row["rm_scores"])
        assert row["chosen"][-1]["content"] == answers_of(row["prompt_id"])[0]
        assert row["chosen_index"] == K
        assert row["chosen_probs_win"] == pytest.approx(sum(row["probability"][K]) / (K + E))
        assert row["rejected"][-1]["content"] == min(texts, key=len)
    manifest = read_json(out / "train.manifest.json")
    assert manifest["settings"]["pairs"] == K + E
    assert manifest["counts"]["pairs"] == N * (K + E) * (K + E - 1)
    assert read_json(out / "ranking" / "shard-00000.manifest.json")["counts"]["pairs"] == manifest["counts"]["pairs"]
    # what is said of the data tells the policy's responses from others' answers
    card = data_card("me/data", "iter1", ["train"], out)
    assert "the first 2 were drawn from the policy, and the last 2 are other models' answers" in card
    assert [f"| generate_{i} | the conversation with response {i}" in card for i in range(5)] == [*[True] * 4, False]
    assert card.count("another model's |") == E
    lengths = gather(tmp_path / "run").iterations[0].lengths
    assert {name: len(found) for name, found in lengths.items()} == {
        "drawn": N * K, "of other models": N * E, "chosen": N, "rejected": N
    }  # fmt: skip
    assert lengths["of other models"].max() > lengths["drawn"].max() == 6  # --maxlen

    refused = tiny.run("scripts/rank.py", *common, "--pairs=3", "--overwrite")
    assert "has 4 responses, not --pairs 3 and 2 of --extra_responses" in refused.stderr


@pytest.mark.parametrize("loss_type", ["sppo", "sppo_all"])
def test_training_reads_all_of_them_token_for_token(recipe: Recipe, tmp_path: Path, loss_type: str) -> None:
    """Also where the file was touched since: then texts and token ids are compared."""
    recipe, out = replace(recipe, loss_type=loss_type), tmp_path / "out"
    drawn(recipe, out)
    rank_shards(recipe, out, [Slice(0, 0)], False)
    compute_prob(recipe, out, False)
    policy = open_policy(recipe.model)
    tokenizer = policy.tokenizer()
    rows = list(read_rows(out / "train.parquet", ["responses", "chosen_index", "rejected_index"]))
    for _ in range(2):
        data = load_training_set(out / "train.parquet", tokenizer, policy.stop_ids(tokenizer), recipe)
        assert data.counts["rows_from_generated_ids"] == data.counts["rows"] == N
        for found, row in zip(data.responses, rows, strict=True):
            pair = [row["chosen_index"], row["rejected_index"]]
            kept = [i for i, r in enumerate(row["responses"]) if r["text"].strip()] if loss_type == "sppo_all" else pair
            assert [ids.tolist() for ids in found] == [row["responses"][i]["token_ids"] for i in kept]
            assert K in kept
        (out / "train.manifest.json").unlink(missing_ok=True)
    generated = tmp_path / "generated.parquet"
    _write_generated(out / "train.parquet", out / "test.parquet", generated, K + E)
    (first, *_) = pq.read_table(generated).to_pylist()
    assert first[f"generate_{K + E - 1}"][-1]["content"] == answers_of(first["prompt_id"])[1]


# before anything is drawn


def test_what_is_missing_is_said_before_anything_is_drawn(recipe: Recipe, tmp_path: Path) -> None:
    file, out = Path(recipe.extra_responses), tmp_path / "out"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-4]))  # without p3 and the other run's
    common = [f"--output_dir={out}", f"--pairs={K}", f"--model={recipe.model}", f"--prompts={recipe.prompts}"]
    for more in (["--only_prompts"], ["--maxlen=6", "--engine=transformers"]):
        refused = tiny.run("scripts/generate.py", *common, f"--extra_responses={file}", *more)
        assert refused.returncode == 1
        assert "1 of 5 prompts have none (p3); 4 of 5 prompts have 2" in refused.stderr
    assert not list(out.glob("responses/*"))


def test_an_overwrite_that_cannot_be_joined_keeps_what_was_drawn(recipe: Recipe, tmp_path: Path) -> None:
    """generate.py --overwrite deleted the shards first, and then found that the file is not there."""
    out = tmp_path / "out"
    drawn(recipe, out)
    before = tiny.contents(out)
    with pytest.raises(SPPOError, match="no such file"):
        generate_shards(replace(recipe, extra_responses="nowhere.jsonl"), out, [Slice(0, 0)], True)
    assert tiny.contents(out) == before


def test_the_preflight_checks_ids_and_counts_what_is_ranked(models: Path, tmp_path: Path) -> None:
    """K = 3 and E = 2: 40 prompts x 5 x 4 comparisons. Each iteration has its own file by {iter}."""
    flags = flags_of(models, tmp_path)
    rows = [{"prompt_id": f"p{i}", "prompt": f"Name {i} rivers"} for i in range(40)]
    tiny.write_jsonl(tmp_path / "prompts.jsonl", rows)
    asked = f"--extra_responses={tmp_path}/extra-{{iter}}.jsonl"
    tiny.write_jsonl(tmp_path / "extra-1.jsonl", one_a_row([f"p{i}" for i in range(40)]))
    said = only_no(examined_by(models, tmp_path, asked))
    assert said.startswith("iteration 2: --extra_responses")
    assert "extra-2.jsonl: no such file" in said
    tiny.write_jsonl(tmp_path / "extra-2.jsonl", one_a_row([f"p{i}" for i in range(39)]))
    assert "iteration 2: " in (said := only_no(examined_by(models, tmp_path, asked)))
    assert "1 of 40 prompts have none (p39)" in said
    tiny.write_jsonl(tmp_path / "extra-2.jsonl", [{"prompt_id": f"p{i}", "response": "one"} for i in range(40)])
    shown = tiny.succeed("scripts/doctor.py", *flags, asked)
    assert "iteration 1: 2 answers of other models a prompt, ranked beside the 3 drawn" in shown
    assert "iteration 2: 1 answer of other models a prompt" in shown
    for i, comparisons in ((1, 800), (2, 480)):
        assert re.search(rf"iteration {i} +40 +120 +{comparisons} ", shown), shown


def test_reports_and_suites_draw_without_them(recipe: Recipe, tmp_path: Path) -> None:
    """The file answers the training's prompts; a held-out set would be refused for its lack of answers."""
    asked: list[list[str]] = []
    with mock.patch.object(answers, "call", lambda script, words, *_, **__: asked.append([script, *words])):
        answers.draw(recipe, tmp_path / "out", tmp_path / "logs", "eval")
    assert [words[0] for words in asked] == ["launch", "combine_generate"]
    assert all("--extra_responses=" in words for words in asked)


def test_a_run_names_the_file_of_each_iteration_and_asks_for_it(recipe: Recipe, tmp_path: Path) -> None:
    whole = iterations.opened(replace(recipe, extra_responses="x-{iter}.jsonl", run_dir=str(tmp_path / "run")))
    assert [iterations.iteration(whole, i).extra_responses for i in (1, 2)] == ["x-1.jsonl", "x-2.jsonl"]

    # is it done? With another file, or none, it is not: what is there is other work
    mine = iterations.iteration(replace(whole, extra_responses=recipe.extra_responses), 1)
    drawn(mine, Path(mine.data_dir))

    def combined(one: Recipe) -> Stage:
        *_, (stage,) = iterations.drawing_stages(one, Path(one.data_dir), one.extra_responses)
        return stage

    assert combined(mine).is_current()
    assert not combined(replace(mine, extra_responses="")).is_current()

    # the file is gone when all of the iteration is done: that was known only when its generate.sh looked for it
    for name in ("data/train.manifest.json", "model/sppo_manifest.json"):
        write_json(tmp_path / "run" / "iter1" / name, {"outputs": {}, "inputs": {}, "settings": {}, "counts": {}})
    words = [f"--model={recipe.model}", f"--prompts={recipe.prompts}", "--pairs=2", "--gpus=none", "--iterations=1"]
    words += [f"--ranker={recipe.ranker}", f"--run_dir={tmp_path / 'run'}", "--engine=transformers", "--dry_run"]
    words += ["--maxlen=6", "--temperature=1.0"]
    code, said = call(["scripts/plan.py", *words, f"--extra_responses={tmp_path / 'gone.jsonl'}"], {})
    assert (code, "gone.jsonl: no such file" in said, "ready: yes" in said) == (1, True, False), said

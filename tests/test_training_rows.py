"""What is trained on of another tool's rows, and of our own after an edit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import preferences
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from conversations import CALL, HANDS_ON, IMAGE, RATES, USER, answer, ids, parts, read

from sppo import run_sppo
from sppo.command.errors import SPPOError
from sppo.generation.shards import generate_shards
from sppo.models import chat
from sppo.pairing.training_set import compute_prob
from sppo.recipe import Recipe
from sppo.store.shards import Slice
from sppo.training.data import TrainingSet, load_training_set
from sppo.training.dataset import dataset_file


def test_every_form_of_a_pair_trains_the_same_tokens(models: Path, tmp_path: Path) -> None:
    pair = {"chosen": [USER, answer("yes")], "rejected": [USER, answer("no")], **RATES}
    path = tmp_path / "t.parquet"
    expected = ids(read(models, path, [pair]))
    tokenizer = chat.load_tokenizer(models / "llama3")
    assert [tokenizer.decode(r) for _, r in expected[0]] == ["yes<|eot_id|>", "no<|eot_id|>"]
    user = {"role": "user", "content": parts("Why ", "None?")}
    for form in (
        {"chosen": [user, answer(parts("yes"))], "rejected": [user, answer(parts("n", "o"))]},
        {"prompt": [USER], "chosen": [answer("yes")], "rejected": [answer("no")]},  # trl's explicit prompt
        {"prompt": "Why None?", "chosen": "yes", "rejected": "no"},
        {"prompt": "Why None?", "chosen": pair["chosen"], "rejected": pair["rejected"]},  # UltraFeedback's
        {"chosen": [USER, answer("yes", tool_calls=None)], "rejected": [USER, answer("no", tool_calls=None)]},
    ):
        assert ids(read(models, path, [{**RATES, **form}])) == expected, form


def test_a_prompt_stands_before_answers_of_several_turns(models: Path, tmp_path: Path) -> None:
    """trl's explicit prompt: what follows it begins with the assistant, and may go on."""
    path, more = tmp_path / "t.parquet", [answer("x"), {"role": "user", "content": "y"}]
    whole = {"chosen": [USER, *more, answer("yes")], "rejected": [USER, *more, answer("no")], **RATES}
    expected = ids(read(models, path, [whole]))
    for prompt in ([USER], "Why None?"):
        form = {"prompt": prompt, "chosen": [*more, answer("yes")], "rejected": [*more, answer("no")], **RATES}
        assert ids(read(models, path, [form])) == expected, form
    greeted = {"prompt": [answer("Hi."), USER], **RATES}
    parts_of = [
        {**greeted, "chosen": [*start, answer("yes")], "rejected": [*start, answer("no")]}
        for start in ([], greeted["prompt"])
    ]
    one, other = (ids(read(models, path, [row])) for row in parts_of)
    assert one == other  # the prompt is there already
    begun = {"prompt": [USER, answer("The")], "chosen": [answer(" sky")], "rejected": [answer(" sea")], **RATES}
    begun |= {"responses": [{"text": "a"}, {"text": "b"}], "probability": [[0.5, 0.9], [0.1, 0.5]]}
    with pytest.raises(SPPOError, match="no rows to train on; .*which the answer would continue"):
        read(models, path, [{**begun, "chosen": None, "rejected": None}], loss_type="sppo_all")
    data = read(models, path, [begun, {"prompt": None, **whole}])
    said = "prompt: it ends with an assistant's turn, which the answer would continue"
    assert len(data) == data.counts[f"rows_left_out ({said})"] == 1


@pytest.mark.parametrize("left_out", ["responses", "chosen_index", "prompt_token_ids"])
def test_a_pair_needs_none_of_the_generated_columns(models: Path, paired: Path, tmp_path: Path, left_out: str) -> None:
    table = pq.read_table(paired / "train.parquet").drop_columns([left_out])
    data = read(models, tmp_path / "t.parquet", table)
    assert data.counts["rows_from_template"] == 6
    assert [row[0][0] for row in ids(data)] == [row[0][0] for row in ids(unedited(models, paired))]


def test_a_pair_with_tool_calls_is_left_out_and_counted(models: Path, tmp_path: Path) -> None:
    called = [USER, answer("", tool_calls=CALL), {"role": "tool", "content": "blue"}, answer("yes")]
    plain = {"chosen": [USER, answer("yes")], "rejected": [USER, answer("no")], **RATES}
    rows = [{**plain, "chosen": called}, plain, {**plain, "rejected": called}]
    data = read(models, tmp_path / "t.parquet", rows)
    assert len(data) == data.counts["rows"] == 1
    for column in ("chosen", "rejected"):
        assert data.counts[f"rows_left_out ({column}: a message has tool_calls, {HANDS_ON})"] == 1
    with pytest.raises(SPPOError, match=r"no rows to train on; .*tool_calls"):
        read(models, tmp_path / "t.parquet", rows[:1])
    shown = [{"role": "user", "content": [*parts("Why None?"), IMAGE]}, answer(parts("yes"))]
    texts = [{"role": "user", "content": parts("Why None?")}, answer(parts("no"))]
    rows = [{"chosen": shown, "rejected": texts, **RATES}, {"chosen": texts, "rejected": texts, **RATES}]
    data = read(models, tmp_path / "t.parquet", rows)
    assert len(data) == data.counts["rows_left_out (chosen: a message has parts that are not text)"] == 1
    tools = [{"function": {"name": "weather"}}]
    data = read(models, tmp_path / "t.parquet", [{**plain, "tools": tools}, {**plain, "tools": None}])
    assert len(data) == data.counts[f"rows_left_out (the row has tools, {HANDS_ON})"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": [USER, answer(["yes"])]}, "row 1: chosen is not .*parts that are not text"),
        ({"rejected": [USER, answer(7)]}, "row 1: rejected is not .*not text"),
        ({"rejected": [USER, answer(None)]}, "row 1: rejected is not .*not text"),
        ({"chosen": "yes", "prompt": [USER]}, "row 1: chosen is not .*no list of messages"),
        ({"chosen": [answer("yes")]}, "row 1: chosen is not .*ends with the assistant"),
        ({"chosen": [USER]}, "row 1: chosen is not .*ends with the assistant"),
        ({"chosen": []}, "row 1: chosen is not .*ends with the assistant"),
        ({"chosen_probs_win": float("nan")}, "row 1: win rates .*between 0 and 1"),
        ({"chosen_probs": "0.9"}, "row 1: win rates .*between 0 and 1"),
        ({"chosen_probs": True}, "row 1: win rates .*between 0 and 1"),
        ({"chosen_probs_win": 1.001}, "row 1: win rates .*between 0 and 1"),
    ],
)
def test_what_is_no_text_or_no_number_is_refused_with_row_and_column(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    from sppo.training import data

    good = {"chosen": [USER, answer("yes")], "rejected": [USER, answer("no")], **RATES}
    path = tmp_path / "t.parquet"
    read(models, path, [good])
    # a Parquet file holds one type a column: rows of two types as they come out of two files
    monkeypatch.setattr(data, "read_rows", lambda *_: [good, {**good, **change}])
    tokenizer = chat.load_tokenizer(models / "llama3")
    with pytest.raises(SPPOError, match=message):
        load_training_set(path, tokenizer, {4}, Recipe())


@pytest.mark.parametrize("loss_type", ["sppo", "sppo_all"])
def test_win_rates_are_numbers_of_any_kind(models: Path, tmp_path: Path, loss_type: str) -> None:
    made = {"chosen": [USER, answer("yes")], "rejected": [USER, answer("no")], "prompt": [USER]}
    made["responses"] = [{"text": "yes"}, {"text": "no"}]
    for p, win, lose, expected in (
        (Decimal("1.000"), Decimal("0.750"), Decimal("0.250"), [1, 0.75, 0.25]),
        (1, 1, 0, [1, 1, 0]),
        (1.0000000000000002, 0.75, -1e-17, [1, 0.75, 0]),
    ):
        rates = {"chosen_probs": p, "chosen_probs_win": win, "chosen_probs_lose": lose}
        half = type(p)(1) if isinstance(p, int) else type(p)("0.5")
        row = {**made, **rates, "probability": [[half, p], [1 - p, half]]}
        found = read(models, tmp_path / "t.parquet", [row], loss_type=loss_type).win_rates[0].tolist()
        if loss_type == "sppo":
            assert found == expected
        else:
            assert found == [1, *([1, 0.5] if isinstance(p, int) else [0.75, 0.25])]


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "ipo_mean", "kto_pair"])
def test_losses_of_plain_pairs_ask_for_no_win_rates(models: Path, tmp_path: Path, loss_type: str) -> None:
    pair = {"chosen": [USER, answer("yes")], "rejected": [USER, answer("no")]}
    path = tmp_path / "t.parquet"
    assert ids(read(models, path, [pair], loss_type=loss_type)) == ids(read(models, path, [{**pair, **RATES}]))
    assert read(models, path, [{**pair, **RATES}], loss_type=loss_type).win_rates.tolist() == [
        pytest.approx([0.9, 0.8, 0.3])
    ]
    assert read(models, path, [{**pair, **RATES, "chosen_probs": "?"}], loss_type=loss_type).win_rates.isnan().all()
    for needs in ("sppo", "sppo_single"):
        with pytest.raises(SPPOError, match="no column chosen_probs, chosen_probs_win, chosen_probs_lose"):
            read(models, path, [pair], loss_type=needs)


@pytest.mark.slow
def test_pairs_without_win_rates_train(models: Path, tmp_path: Path) -> None:
    """DPO's first loss is log 2, and the metrics have no targets, which are made of win rates."""
    rows = [{k: row[k] for k in ("chosen", "rejected")} for row in preferences.rows(8)]
    data = preferences.write(tmp_path / "data", rows)
    flags = [f"--model={models / 'llama3'}", f"--dataset={data}", f"--output_dir={tmp_path / 'model'}"]
    run_sppo.main([*preferences.SMALL, *flags, "--loss_type=sigmoid"])
    (line,) = preferences.metrics(tmp_path / "model")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(math.isfinite(value) for value in line.values())
    assert "rewards/margins" in line
    assert "rewards/chosen_target" not in line


def test_an_end_that_the_tokenizer_does_not_know_spells_nothing(models: Path) -> None:
    """Embeddings are padded: a model may name an end of which its tokenizer has no token."""
    tokenizer = chat.load_tokenizer(models / "llama3")
    stops = {*chat.stop_token_ids(models / "llama3", tokenizer), len(tokenizer) + 5}
    assert chat.without_end(tokenizer, "yes \n", stops) == "yes \n"
    assert chat.without_end(tokenizer, "yes \n<|eot_id|>\n", stops) == "yes \n"


@pytest.mark.parametrize("spelled", ["yes<|eot_id|>", "yes<|eot_id|>\n", "yes<|eot_id|><|end_of_text|>", "yes"])
def test_an_answer_ends_once(models: Path, tmp_path: Path, spelled: str) -> None:
    rows = [{"chosen": [USER, answer(spelled)], "rejected": [USER, answer("no")], **RATES}]
    data = read(models, tmp_path / "t.parquet", rows)
    tokenizer = chat.load_tokenizer(models / "llama3")
    assert [tokenizer.decode(r) for _, r in ids(data)[0]] == ["yes<|eot_id|>", "no<|eot_id|>"]
    assert data.counts["ends_spelled_behind_answers"] == (spelled != "yes")
    assert data.counts["ends_spelled_within_answers"] == 0
    rows[0]["rejected"] = [USER, answer("n<|eot_id|>o")]
    assert read(models, tmp_path / "t.parquet", rows).counts["ends_spelled_within_answers"] == 1


def test_a_data_set_of_the_hub_that_cannot_be_read_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:  # what lives on the Hub: a data set with a broken line
        try:
            raise ValueError("JSON parse error: Invalid value. in row 1")
        except ValueError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SPPOError, match="the Hub does not give it: JSON parse error"):
        dataset_file("some/data", Recipe())


@pytest.fixture(scope="module")
def paired(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$DATA of six prompts, drawn and paired."""
    out = tmp_path_factory.mktemp("paired")
    prompts = tiny.write_jsonl(out / "p.jsonl", [{"prompt": f"Why is {n} None?"} for n in range(6)])
    recipe = Recipe(model=str(models / "llama3"), prompts=str(prompts), pairs=3, maxlen=12, engine="transformers")
    generate_shards(recipe, out, [Slice(0, 0)], False)
    names = [row["prompt_id"] for row in pq.read_table(out / "responses.parquet").to_pylist()]
    (out / "ranking").mkdir()
    logits = [[0.0, 2.0, -1.0], [-2.0, 0.0, 1.0], [3.0, 0.5, 0.0]]
    rankings = [{"prompt_id": name, "logits": logits} for name in names]
    pq.write_table(pa.Table.from_pylist(rankings), out / "ranking" / "theirs.parquet")
    compute_prob(recipe, out, False)
    return out


@pytest.fixture
def edited(models: Path, paired: Path, tmp_path: Path) -> Callable[..., TrainingSet]:
    """The training set after `change` has edited the first row in a copy of the file, the manifest beside it."""

    def run(change: Callable[[dict[str, Any]], Any], **settings: Any) -> TrainingSet:
        table = pq.read_table(paired / "train.parquet")
        rows = table.to_pylist()
        change(rows[0])
        shutil.copy(paired / "train.manifest.json", tmp_path)
        return read(models, tmp_path / "train.parquet", pa.Table.from_pylist(rows, schema=table.schema), **settings)

    return run


def unedited(models: Path, paired: Path, **settings: Any) -> TrainingSet:
    tokenizer = chat.load_tokenizer(models / "llama3")
    stops = chat.stop_token_ids(models / "llama3", tokenizer)
    return load_training_set(paired / "train.parquet", tokenizer, stops, Recipe(**settings))


@pytest.mark.parametrize("loss_type", ["sppo", "sppo_all"])
def test_a_file_written_again_trains_what_was_generated(
    models: Path, paired: Path, edited: Callable[..., TrainingSet], loss_type: str
) -> None:
    before = unedited(models, paired, loss_type=loss_type)
    after = edited(lambda row: row.update(rm_scores=None), loss_type=loss_type)
    assert ids(after) == ids(before)
    assert after.counts["rows_from_generated_ids"] == before.counts["rows_from_generated_ids"] == 6
    np.testing.assert_array_equal(after.drawn_logps, before.drawn_logps)
    assert np.isfinite(after.drawn_logps).all()


def test_an_edited_text_is_trained_on(models: Path, paired: Path, edited: Callable[..., TrainingSet]) -> None:
    before = ids(unedited(models, paired))
    tokenizer = chat.load_tokenizer(models / "llama3")

    def check(data: TrainingSet, prompts: list[str], answers: list[str | None]) -> None:
        """Of the first row: prompts as they are read, and answers; None: as it was generated."""
        for (prompt, response), was, text, said in zip(ids(data)[0], before[0], prompts, answers, strict=True):
            assert prompt == chat.prompt_ids(tokenizer, [{"role": "user", "content": text}])
            assert response == was[1] if said is None else tokenizer.decode(response) == f"{said}<|eot_id|>"
        assert ids(data)[1:] == before[1:]
        assert (data.counts["rows_edited"], data.counts["rows_from_generated_ids"]) == (1, 5)

    as_it_was = "Why is 0 None?"
    check(edited(lambda row: row["chosen"][-1].update(content="red")), [as_it_was] * 2, ["red", None])
    check(edited(lambda row: row["rejected"][-1].update(content="")), [as_it_was] * 2, [None, ""])

    def prompt(row: dict[str, Any]) -> None:
        for column in ("chosen", "rejected", "prompt"):
            row[column][0]["content"] = "Why?"

    check(edited(prompt), ["Why?"] * 2, [None, None])

    def flip(row: dict[str, Any]) -> None:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]

    texts = [
        side[-1]["content"]
        for side in map(pq.read_table(paired / "train.parquet").to_pylist()[0].get, ("rejected", "chosen"))
    ]
    check(edited(flip), [as_it_was] * 2, texts)


def test_an_edited_response_is_trained_on_by_sppo_all(
    models: Path, paired: Path, edited: Callable[..., TrainingSet]
) -> None:
    before = ids(unedited(models, paired, loss_type="sppo_all"))
    tokenizer = chat.load_tokenizer(models / "llama3")

    def middle(row: dict[str, Any]) -> int:
        return ({0, 1, 2} - {row["chosen_index"], row["rejected_index"]}).pop()

    data = edited(lambda row: row["responses"][middle(row)].update(text="red"), loss_type="sppo_all")
    found = ids(data)
    assert found[1:] == before[1:]
    changed = [i for i in range(3) if found[0][i] != before[0][i]]
    assert [tokenizer.decode(found[0][i][1]) for i in changed] == ["red<|eot_id|>"]
    assert data.counts["rows_edited"] == 1


def test_an_edit_that_a_loss_does_not_read_is_refused(edited: Callable[..., TrainingSet]) -> None:
    with pytest.raises(SPPOError, match=r"row 0: chosen was edited; sppo_all trains on responses"):
        edited(lambda row: row["chosen"][-1].update(content="red"), loss_type="sppo_all")
    with pytest.raises(SPPOError, match=r"row 0: responses was edited; this loss trains on chosen and rejected"):
        edited(lambda row: row["responses"][row["chosen_index"]].update(text="red"))
    with pytest.raises(SPPOError, match=r"row 0: prompt was edited; this loss trains on chosen and rejected"):
        edited(lambda row: row["prompt"][0].update(content="red"))


def test_a_pair_of_two_prompts_is_refused_and_senseless_pairs_are_counted(models: Path, tmp_path: Path) -> None:
    """Another tool's file may hold them; what is trained on is said."""
    path, other = tmp_path / "t.parquet", {"role": "user", "content": "Why?"}
    pairs = [("yes", "no"), ("yes", "yes"), ("", "no")]
    rows = [{"chosen": [USER, answer(good)], "rejected": [USER, answer(bad)]} for good, bad in pairs]
    counts = read(models, path, rows, loss_type="sigmoid").counts
    assert (counts["pairs_of_equal_answers"], counts["empty_answers"]) == (1, 1)
    with pytest.raises(SPPOError, match="row 0: chosen and rejected answer different prompts"):
        read(models, path, [{"chosen": [USER, answer("yes")], "rejected": [other, answer("no")]}], loss_type="sigmoid")

"""Properties: whatever text, cut, flipped bit or matrix, what is read is what was written, no row another's."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import tempfile
import typing
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo import cli
from sppo.command.errors import SPPOError, UsageError
from sppo.generation.prompts import fingerprint, load_prompts
from sppo.launch.devices import groups
from sppo.method import preference, winrates
from sppo.ranking.shards import prompt_logits
from sppo.recipe import _FIELDS, _TYPES, Recipe, _require_consistent, load_recipe, nearest
from sppo.store.journal import Journal
from sppo.store.shards import Slice

settings.register_profile("small", max_examples=60, derandomize=True, deadline=None, database=None)
settings.load_profile("small")

CONTROL = ["</s>", "[SEP]", "<|candidate1|>", "<|eot_id|>", "[INST]", "<|im_end|>", "None", "\0", "🙂", "שלום"]
CONTROL += ["e\u0301", "\ufeff", "\u2028", "\r\n", '"', ",", "\x1f", " ", ""]
TEXT = st.lists(st.one_of(st.sampled_from(CONTROL), st.text(max_size=12)), max_size=4).map("".join)

# parsing


@given(st.lists(TEXT, min_size=1, max_size=8), st.booleans())
def test_prompts_are_read_as_they_were_written(texts: list[str], with_ids: bool) -> None:
    texts = [f"{text}." for text in texts]  # not blank: none of these is skipped
    rows = [{"prompt": text} | ({"prompt_id": f"{n} {text}"} if with_ids else {}) for n, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as scratch:
        where = [Path(scratch) / name for name in ("p.jsonl", "q.jsonl", "p.parquet", "p.csv", "saved")]
        where[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
        where[1].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        pq.write_table(pa.Table.from_pylist(rows), where[2])
        if any("\0" in text for text in texts):
            where.pop(3)
        else:
            with open(where[3], "w", newline="", encoding="utf-8") as handle:
                writer = csv.DictWriter(handle, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        datasets.disable_progress_bars()
        table = datasets.Dataset.from_list(rows)
        table.save_to_disk(str(where[-1]))
        datasets.DatasetDict({"train": table}).save_to_disk(str(Path(scratch) / "splits"))
        (Path(scratch) / "folder").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), Path(scratch) / "folder" / "train.parquet")
        where += [Path(scratch) / "splits", Path(scratch) / "folder"]
        found = [load_prompts(str(path), Recipe()) for path in where]
    assert [p.messages for p in found[0]] == [[{"role": "user", "content": text}] for text in texts]
    if with_ids:
        assert [p.prompt_id for p in found[0]] == [row["prompt_id"] for row in rows]
    assert len({p.prompt_id for p in found[0]}) == len(texts)
    assert [fingerprint(prompts) for prompts in found] == [fingerprint(found[0])] * len(where)


def values(name: str) -> st.SearchStrategy[Any]:
    """Any value of a recipe's key."""
    kind, meta = _TYPES[name], _FIELDS[name].metadata
    low, high = meta["min"], meta["max"]
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(int(low), int(high or 2**40))
    if kind is float:
        return st.floats(low, high, allow_nan=False, allow_infinity=False)
    if kind is dict:
        return st.dictionaries(
            TEXT, st.one_of(st.booleans(), st.integers(), TEXT, st.lists(TEXT, max_size=2)), max_size=3
        )
    return TEXT


def is_consistent(made: dict[str, Any]) -> bool:
    """Settings that contradict each other, K times the likeliest token for example, are refused."""
    try:
        _require_consistent(Recipe(**made))
    except UsageError:
        return False
    return True


PARTS = {"prompts_part": st.sampled_from(["0/1", "1/3"])}
RECIPES = st.fixed_dictionaries(
    {}, optional={**{f.name: values(f.name) for f in dataclasses.fields(Recipe)}, **PARTS}
).filter(is_consistent)


@given(RECIPES)
def test_a_recipe_and_its_flags_come_back(changes: dict[str, Any]) -> None:
    """As plan.py hands it to the stages: written as YAML, or as --key=value."""
    made = Recipe(**changes)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "r.yaml"
        path.write_text(yaml.safe_dump(dataclasses.asdict(made), sort_keys=False), encoding="utf-8")
        assert load_recipe(path) == made
    flags = [f"--{k}={json.dumps(v) if isinstance(v, dict) else v}" for k, v in changes.items()]
    names = [f.name for f in dataclasses.fields(Recipe)]
    assert cli.parse(cli.make_parser("", names), flags)[1] == made


@given(TEXT, st.lists(TEXT, max_size=3))
def test_a_hint_never_raises(name: str, known: list[str]) -> None:
    assert isinstance(nearest(name, known), str)


YAML = ["pairs", ": ", "\n", "- ", "{", "}", "[", "]", "!!int ", "!!timestamp ", "!!binary ", "&a ", "*a", "<<: ", "? "]
YAML += [
    "2024-99-99",
    ".inf",
    "1e400",
    "0b",
    "model",
    "seed",
    "true",
    "null",
    "!!python/object:os.system ",
    "|",
    "'",
    '"',
]


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(YAML), max_size=9).map("".join)))
def test_any_text_is_a_recipe_or_wrong_use(text: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "r.yaml"
        path.write_bytes(text.encode("utf-8", "replace"))
        try:
            found = load_recipe(path)
        except UsageError as error:
            assert str(error)  # noqa: PT017 - either is right
        else:
            assert isinstance(found, Recipe)


# sharding


@given(st.integers(0, 500), st.integers(1, 40), st.integers(0, 60))
def test_shards_are_disjoint_in_order_and_complete(total: int, shards: int, frac_len: int) -> None:
    count = max(1, -(-total // frac_len)) if frac_len else shards
    bounds = [Slice(frac_len, i, shards).bounds(total) for i in range(count)]
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(total))
    assert Slice(frac_len, count, count + 1).bounds(total)[0] == total or not frac_len


@given(st.lists(TEXT, min_size=1, max_size=20), st.integers(1, 9))
def test_parts_are_disjoint_and_complete(texts: list[str], parts: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "p.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{text}."}) + "\n" for text in texts))
        whole = [p.prompt_id for p in load_prompts(str(path), Recipe())]
        found = []
        for i in range(parts):
            if i < len(texts):
                found += [p.prompt_id for p in load_prompts(str(path), Recipe(), (i, parts))]
            else:
                with pytest.raises(SPPOError, match="too few"):
                    load_prompts(str(path), Recipe(), (i, parts))
    assert sorted(found) == sorted(whole)
    assert len(set(whole)) == len(texts)


@given(st.integers(1, 16), st.integers(1, 8))
def test_groups_hold_every_gpu_once(gpus: int, world: int) -> None:
    names = [str(i) for i in range(gpus)]
    if gpus % world:
        with pytest.raises(UsageError):
            groups(names, world)
    else:
        found = groups(names, world)
        assert [name for group in found for name in group.split(",")] == names
        assert {len(group.split(",")) for group in found} == {world}


# journals

ITEMS = st.dictionaries(TEXT, st.dictionaries(TEXT, st.one_of(TEXT, st.floats(allow_nan=False), st.none())), max_size=5)
IDENTITY = {"inputs": {"model": "a"}, "settings": {}}


FLIP = st.one_of(st.none(), st.tuples(st.integers(0, 10_000), st.integers(0, 7), st.booleans()))


@settings(max_examples=150)
@given(ITEMS, st.integers(0, 10_000), FLIP)
def test_a_journal_keeps_what_is_whole_and_invents_nothing(
    items: dict[str, Any], cut: int, flip: tuple[int, int, bool] | None
) -> None:
    """Cut at any byte, and any one bit of it flipped. A line end that is flipped costs both its lines, and no more."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "j"
        journal = Journal(path, IDENTITY)
        ends = {}
        for key, value in items.items():
            journal.add(key, value)
            ends[key] = path.stat().st_size
        journal.close()
        content = bytearray(path.read_bytes())
        starts = dict(zip(ends, [content.index(b"\n") + 1, *ends.values()], strict=False))
        content = content[: cut % (len(content) + 1)]
        flipped = -1
        if flip and content:
            line_ends = [i for i, byte in enumerate(content) if byte == 10]
            places = line_ends if flip[2] and line_ends else range(len(content))
            flipped = places[flip[0] % len(places)]
            content[flipped] ^= 1 << flip[1]
        path.write_bytes(content)
        journal = Journal(path, IDENTITY)
        whole = {k for k in items if ends[k] <= len(content) and not starts[k] - 1 <= flipped < ends[k]}
        assert whole <= set(journal.done) <= set(items)
        assert {key: journal.read(key) for key in journal.done} == {key: items[key] for key in journal.done}
        journal.add("added", {"text": "x"})
        journal.close()
        again = Journal(path, IDENTITY)
        assert set(again.done) == set(journal.done)
        assert again.read("added") == {"text": "x"}
        again.close()


# estimators


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """(N, K, K) logits with diagonal 0, ties among them, and a permutation of the K."""
    k, n = draw(st.integers(2, 7)), draw(st.integers(1, 3))
    number = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 40.0]), st.floats(-50, 50, width=32))
    flat = draw(st.lists(number, min_size=n * k * k, max_size=n * k * k))
    logits = np.array(flat).reshape(n, k, k)
    logits[:, range(k), range(k)] = 0
    return logits, np.array(draw(st.permutations(range(k))))


def slowly(logits: list[list[float]], estimator: str) -> list[list[float]]:
    """P as the method writes it, one number after the other."""
    k = len(logits)
    score = [sum(logits[i][j] - logits[j][i] for j in range(k)) / k for i in range(k)]

    def p(i: int, j: int) -> float:
        gap = score[i] - score[j] if estimator == "released" else (logits[i][j] - logits[j][i]) / 2
        return 1 / (1 + math.exp(-gap)) if gap >= 0 else math.exp(gap) / (1 + math.exp(gap))

    return [[p(i, j) for j in range(k)] for i in range(k)]


@pytest.mark.parametrize("estimator", ["released", "paper"])
@given(made=matrices())
def test_estimators(estimator: str, made: tuple[np.ndarray, np.ndarray]) -> None:
    logits, order = made
    p = preference.probability(logits, estimator)
    assert ((p >= 0) & (p <= 1)).all()
    np.testing.assert_allclose(p + p.swapaxes(1, 2), 1, rtol=1e-12)
    assert (p[:, range(len(order)), range(len(order))] == 0.5).all()
    for n, matrix in enumerate(logits):
        np.testing.assert_allclose(p[n], slowly(matrix.tolist(), estimator), rtol=1e-9)
        np.testing.assert_array_equal(p[n], preference.probability(matrix[None], estimator)[0])  # alone as in a batch
    np.testing.assert_allclose(
        preference.probability(logits[:, order][:, :, order], estimator), p[:, order][:, :, order], 1e-9, 1e-300
    )
    rates = p.mean(-1)
    best, worst = winrates.best_and_worst(rates)
    for row, w, lose in zip(rates.tolist(), best, worst, strict=True):
        assert (w, lose) == (row.index(max(row)), row.index(min(row)))  # the first wins a tie
    assert (rates[range(len(rates)), best] >= 0.5 - 1e-12).all()  # the mean of all is a half
    np.testing.assert_allclose(rates.mean(-1), 0.5, rtol=1e-9)


# ranking


class Words:
    """Says something else of every ordered pair, and answers in any order."""

    def __init__(self, shuffle: np.random.Generator) -> None:
        self.shuffle, self.asked = shuffle, []

    def logit(self, prompt: str, first: str, second: str) -> float:
        return float(hash((prompt, first, second)) % 1009) - 504

    def logits(self, pairs: list[Any]) -> Any:
        self.asked += [(prompt[0]["content"], first, second) for prompt, first, second in pairs]
        for i in self.shuffle.permutation(len(pairs)):
            prompt, first, second = pairs[i]
            yield int(i), self.logit(prompt[0]["content"], first, second)


@given(st.lists(st.lists(st.sampled_from(["a", "b", "", "a ", "[SEP]"]), min_size=2, max_size=6), max_size=4))
def test_identical_responses_are_asked_once_and_change_nothing(answers: list[list[str]]) -> None:
    ranker = Words(np.random.default_rng(len(answers)))
    items = [([{"role": "user", "content": f"p{n}"}], texts) for n, texts in enumerate(answers)]
    found = dict(prompt_logits(ranker, items))
    for n, texts in enumerate(answers):
        for i, j in itertools.product(range(len(texts)), repeat=2):
            assert found[n][i][j] == (0.0 if i == j else ranker.logit(f"p{n}", texts[i], texts[j]))
        mine = [pair[1:] for pair in ranker.asked if pair[0] == f"p{n}"]
        assert sorted(mine) == sorted(set(itertools.permutations(texts, 2)))

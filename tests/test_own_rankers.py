"""A class of the user's ranks: the page's example as it stands there, what it may return, and when it is made."""

from __future__ import annotations

import itertools
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from preferences import data_directory

from sppo.command.errors import SPPOError, UsageError
from sppo.preflight.facts import Machines, Run
from sppo.preflight.ranking import fetch_ranker, try_ranker
from sppo.rankers import function
from sppo.ranking.shards import rank_shards
from sppo.recipe import Recipe
from sppo.schema import Pair
from sppo.store.files import digest, read_json
from sppo.store.shards import Slice

PAGE = (tiny.ROOT / "docs" / "rankers.md").read_text(encoding="utf-8")
CHAT = [{"role": "user", "content": "q"}]
PAIRS: list[Pair] = [(CHAT, "abc", "a"), (CHAT, "a", "abc"), (CHAT, "ab", "a")]

# a reward model as ArmoRM is one: its own code, objectives, and a gate that reads the prompt's end
HEAD = """
from dataclasses import dataclass
import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput

@dataclass
class Output(ModelOutput):
    score: torch.Tensor = None

class LlamaForRewardModelWithGating(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, 3, bias=False)
        self.gating = nn.Linear(config.hidden_size, 3, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **_):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        gate = torch.softmax(self.gating(hidden[:, 1]), -1)
        return Output(score=(gate * self.regression_layer(hidden[:, -1])).sum(-1))
"""


def block(containing: str) -> str:
    """The one Python block of the page with this text."""
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if containing in code]
    return found


@pytest.fixture
def armorm(tmp_path: Path) -> Path:
    """A tiny model with that head, saved with its code."""
    import torch
    from transformers import LlamaConfig

    space: dict[str, Any] = {"__name__": "modeling_custom"}
    exec(HEAD, space)  # noqa: S102 - the text above
    tokens = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    fast = tiny.tokenizer(tokens, tokens[0], "<|eot_id|>", "<|end_of_text|>", tiny.LLAMA3_TEMPLATE)
    config = LlamaConfig(**tiny.shape(fast))
    config.auto_map = {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"}
    torch.manual_seed(0)
    model = space["LlamaForRewardModelWithGating"](config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    model.save_pretrained(tmp_path / "armorm")
    fast.save_pretrained(tmp_path / "armorm")
    (tmp_path / "armorm" / "modeling_custom.py").write_text(HEAD)
    return tmp_path / "armorm"


def plain_scores(directory: Path, prompt: str, answers: list[str]) -> np.ndarray:
    """(K,) the model's scores by transformers alone: the rendered text, one forward each."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True).eval()
    scores = []
    for answer in answers:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        with torch.inference_mode():
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            scores.append(model(ids).score.item())
    return np.array(scores)


def test_the_pages_class_ranks_as_the_plain_model_does(
    armorm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who copies the example gets the model's own preferences, and other weights at the same place are refused."""
    code = block("class ArmoRM")
    assert 'Path("models/armorm").absolute()' in code
    (tmp_path / "mine.py").write_text(code.replace("models/armorm", str(armorm)))
    answers = [["one", "a longer answer than that", "a"], ["same", "same", "other"]]
    data = data_directory(tmp_path / "data", answers)
    (data / "ranking" / "theirs.parquet").unlink()
    command = ["scripts/rank.py", "--output_dir", str(data), "--ranker", "mine:ArmoRM", "--pairs", "3"]
    env = {"PYTHONPATH": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    tiny.succeed(*command, **env)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    rows = {r["prompt_id"]: r for r in pq.read_table(data / "ranking" / "shard-00000.parquet").to_pylist()}
    for n, texts in enumerate(answers):
        scores = plain_scores(armorm, f"prompt {n // 2}", texts)
        assert np.ptp(scores) > 0.01  # the model tells the texts apart
        np.testing.assert_allclose(rows[f"id{n}"]["logits"], 50 * (scores[:, None] - scores), atol=1e-3)

    (armorm / "note.json").write_text("{}")
    refused = tiny.run(*command, **env)
    assert refused.returncode == 1
    assert "inputs.ranker.identity" in refused.stderr


def test_the_pages_function_of_a_list_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lists.py").write_text(block("shorter_of_all.batched"))
    monkeypatch.syspath_prepend(str(tmp_path))
    ranker = function.load(Recipe(ranker="lists:shorter_of_all"))
    assert ranker.batched
    assert list(ranker.logits(PAIRS)) == [(0, -2.0), (1, 2.0), (2, -1.0)]
    assert list(ranker.logits([])) == []
    assert function.identity(Recipe(ranker="lists:shorter_of_all")) == {
        "backend": "function",
        "ranker": "lists:shorter_of_all",
        "source": digest(tmp_path / "lists.py"),
    }


MADE = """
import pathlib
log = pathlib.Path(__file__).with_name("log")

class Longer:
    def __init__(self):
        with log.open("a") as out:
            out.write("made\\n")

    @staticmethod
    def identity():
        return {"weights": (1, "a")}

    def logits(self, pairs):
        with log.open("a") as out:
            out.write(f"asked {len(pairs)}\\n")
        for index in reversed(range(len(pairs))):
            prompt, first, second = pairs[index]
            assert prompt[0]["role"] == "user"
            yield index, float("nan") if "silent" in prompt[-1]["content"] else float(len(first) - len(second))

    def count_cut(self, messages, responses):
        return sum(len(text) > 3 for text in responses)
"""


def test_a_class_is_made_once_a_process_and_not_to_be_asked_who_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards, one load; a ranking that is done loads nothing. No answer is set aside, cut texts are counted."""
    (tmp_path / "once.py").write_text(MADE)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = data_directory(tmp_path / "data", [["a", "abcd", "ab"], ["abcde", "a", "abcd"]] * 2)
    (data / "ranking" / "theirs.parquet").unlink()
    table = pq.read_table(data / "responses.parquet").to_pylist()
    table[3]["prompt"][0]["content"] = "silent"
    pq.write_table(pa.Table.from_pylist(table), data / "responses.parquet")
    recipe = Recipe(ranker="once:Longer", pairs=3)
    assert function.identity(recipe)["identity"] == {"weights": [1, "a"]}
    assert function.fetch(recipe) == tmp_path / "once.py"
    assert not (tmp_path / "log").exists()
    parts = [Slice(0, 0, 2), Slice(0, 1, 2)]
    rank_shards(recipe, data, parts, False)
    rank_shards(recipe, data, parts, False)
    list(function.load(recipe).logits(PAIRS[:1]))
    assert (tmp_path / "log").read_text().splitlines() == ["made", "asked 12", "asked 12", "asked 1"]
    first, second = (read_json(data / "ranking" / f"shard-0000{n}.manifest.json") for n in (0, 1))
    assert first["counts"]["texts_cut_for_the_ranker"] == 3
    assert second["counts"]["skipped"] == {"the ranker's logits are not finite": 1}
    rows = pq.read_table(data / "ranking" / "shard-00000.parquet").to_pylist()
    assert rows[0]["logits"] == [[0, -3, -1], [3, 0, 2], [1, -2, 0]]


def answering(returns: Any) -> function.ListRanker:
    def own(pairs: list[Pair]) -> Any:
        return returns(pairs) if callable(returns) else returns

    return function.ListRanker(own, "the ranker's class m:R")


def fails(pairs: list[Pair]) -> Any:
    raise RuntimeError("no weights")


@pytest.mark.parametrize(
    ("returns", "said"),
    [
        ([1.0, 2.0], "gave 2 logits for a list of pairs; .*; the list had 3 pairs"),
        (lambda pairs: itertools.count(), "gave more than 3 logits"),
        ([[0.1, 0.9]] * 3, r"gave \[0.1, 0.9\], not a number"),
        ([(0.1, 0.9)] * 3, r"gave \(0.1, 0.9\), not a logit or \(index, logit\)"),
        ([(0, 0.1, 0.9)] * 3, "not a logit or"),
        (np.zeros((3, 2)), r"gave array\(\[0., 0.\]\), not a number"),
        ([(0, 1.0), (0, 2.0), (2, 1.0)], r"gave \(0, 2.0\) twice, or of no pair"),
        ([(0, 1.0), (1, 2.0), (3, 1.0)], r"gave \(3, 1.0\) twice, or of no pair: they are 0 to 2"),
        ([(0, 1.0), (-1, 2.0), (2, 1.0)], r"gave \(-1, 2.0\) twice, or of no pair"),
        ([(0, 1.0), (1, 2.0)], "gave 2 logits"),
        ([(0, 1.0), 2.0, 3.0], "a number too; give only one of the two"),
        (["0.5", "1", "2"], "gave '0.5', not a number"),
        ([1.0, None, 2.0], "gave None, not a number"),
        (None, "gave None, not logits for a list of pairs"),
        (0.5, "gave 0.5, not logits"),
        ("123", "gave '123', not logits"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "not logits for a list"),
        ({1.0, 2.0, 3.0}, "not logits for a list"),
        ([1j, 2j, 3j], "gave 1j, not a number"),
        (fails, r"failed: RuntimeError: no weights \(.*test_own_rankers.py, line \d+\); mend it"),
        ((x for x in [1, 2, 3] if x / (x - 2)), "failed: ZeroDivisionError"),
    ],
)
def test_what_is_no_logit_for_each_pair_is_one_line(returns: Any, said: str) -> None:
    """A value that is left out, doubled or of another kind would give every pair behind it another one's logit."""
    with pytest.raises(SPPOError, match=f"^the ranker's class m:R .*{said}") as error:
        dict(answering(returns).logits(PAIRS))
    assert "\n" not in str(error.value)


def test_all_that_holds_numbers_is_a_list_of_logits() -> None:
    import torch

    for given in ([1, 2.5, math.inf], (1, 2.5, math.inf), np.array([1, 2.5, math.inf]), iter([1, 2.5, math.inf])):
        assert list(answering(given).logits(PAIRS)) == [(0, 1.0), (1, 2.5), (2, math.inf)]
    column = torch.tensor([[1.0], [2.5], [3.0]])
    assert list(answering(column).logits(PAIRS)) == [(0, 1.0), (1, 2.5), (2, 3.0)]


def test_what_a_class_does_to_the_messages_does_not_reach_the_next_pair() -> None:
    """messages.append(the answer) is a usual slip; each further pair of the prompt was read behind all before it."""

    def own(pairs: list[Pair]) -> Any:
        for messages, first, _ in pairs:
            messages.append({"role": "assistant", "content": first})
            messages[0]["content"] += "!"
            yield float(len(messages) + len(messages[0]["content"]))

    chat = [{"role": "user", "content": "q"}]
    assert dict(function.ListRanker(own, "m:R").logits([(chat, "a", "b")] * 3)) == dict.fromkeys(range(3), 4.0)
    assert chat == CHAT


def test_numbers_that_are_too_few_are_not_used_at_all() -> None:
    """They reached the journal before the end of the list showed that one of them was missing."""
    with pytest.raises(SPPOError, match="gave 2 logits"):
        next(iter(answering([1.0, 2.0]).logits(PAIRS)))


WRONG = """
import os
import pathlib
import signal

class Nothing:
    pass

class Plain:
    def logits(self, pairs): return []
    def identity(self): return "weights"

class Yes:
    batched = "yes"
    def logits(self, pairs): return []

class Silent:
    @classmethod
    def identity(cls): pass
    def logits(self, pairs): return []

class NoJSON(Silent):
    @classmethod
    def identity(cls): return {"a": object()}

class Fails(Silent):
    @classmethod
    def identity(cls): raise KeyError("weights")

class Wants:
    def __init__(self, path): pass
    def logits(self, pairs): return []

class Killed:
    def __init__(self): os.kill(os.getpid(), signal.SIGKILL)
    def logits(self, pairs): return []

class Good:
    def __init__(self): pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
    def logits(self, pairs):
        return [len(a) - len(b) for _, a, b in pairs]

def takes_a_list(pairs): return []

def takes_three(prompt, a, b): return 0
takes_three.batched = True
"""


@pytest.fixture
def wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wrong", raising=False)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("Nothing", UsageError, "--ranker wrong:Nothing: a class that ranks has a method logits"),
        ("Plain", UsageError, r"--ranker wrong:Plain: put @classmethod above its identity\(\)"),
        ("Yes", UsageError, "its attribute batched is 'yes', not True or False"),
        ("Silent", SPPOError, r"identity\(\) gave None"),
        ("NoJSON", SPPOError, r"identity\(\) gave .*object.*; return a text"),
        ("Fails", SPPOError, r"identity\(\) failed: KeyError: 'weights' \(.*wrong.py, line"),
        ("takes_a_list", UsageError, r"it takes \(pairs\), and is called with \(prompt, first, second\); .*batched"),
        ("takes_three", UsageError, r"it takes \(prompt, a, b\), and is called with \(pairs\), because"),
    ],
)
def test_a_class_that_cannot_rank_is_refused_before_any_work(
    wrong: None, name: str, kind: type[SPPOError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        function.fetch(Recipe(ranker=f"wrong:{name}"))


def tried(name: str, **more: Any) -> list[str]:
    """What the preflight says of a class."""
    run, told = Run(Recipe(ranker=f"wrong:{name}"), [""], [], **more), f"wrong:{name}"

    def look() -> Any:
        found = yield from fetch_ranker(run.recipe, told)
        yield from try_ranker(run, found, Machines(1 << 30), told, f"--ranker {told}")

    return [f"{finding.level}: {finding.text}" for finding in look()]


def test_the_preflight_makes_a_class_in_a_process_of_its_own(wrong: None, tmp_path: Path) -> None:
    """An 8B would stay in the preflight's memory; one that the kernel kills would end the preflight."""
    assert tried("Good") == ["ok: wrong:Good; it loads and answers a trial pair (-19, 19 the other way round)"]
    assert (tmp_path / "pid").read_text() != str(os.getpid())
    with pytest.raises(SPPOError, match="--ranker wrong:Killed: the process .* was killed"):
        tried("Killed")
    with pytest.raises(SPPOError, match="wrong:Wants, which is made without arguments, failed: TypeError: .*path"):
        tried("Wants")
    assert tried("Killed", cluster=object()) == [
        "note: wrong:Killed; it is made on the cluster's machines, and was not tried here"
    ]

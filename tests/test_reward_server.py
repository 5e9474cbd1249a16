"""A reward model behind a server: vLLM's own over a tiny one, and a small server for what a real one does not do."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from preferences import data_directory
from stub_server import Stub
from test_reward_model import PROMPTS, RESPONSES, make

from sppo.command.errors import SPPOError, UsageError
from sppo.preflight.facts import Run
from sppo.preflight.ranking import check_ranker, look_at_ranker
from sppo.rankers import reward_server
from sppo.rankers.reward_model import RewardModel
from sppo.rankers.reward_server import RewardServer
from sppo.ranking.shards import prompt_logits
from sppo.recipe import Recipe
from sppo.store.files import read_json

KEY = "sk-" + "k" * 40
PAIRS = [(PROMPTS[0], a, b) for a, b in permutations(["a", "It is blue.", ""], 2)]
TRIALS = len(reward_server._TRIALS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("served") / "llama", "llama")


def recipe_of(directory: Path, url: str, **more: Any) -> Recipe:
    return Recipe(ranker=str(directory), ranker_backend="reward-server", ranker_url=url, ranker_concurrency=2, **more)


# vLLM's own server


@pytest.fixture(scope="module")
def vllm(directory: Path) -> Iterator[str]:
    """The URL of vLLM's server over the reward model, which it serves by its directory."""
    pytest.importorskip("vllm")
    pytest.importorskip("openai")
    with tiny.chat_server(directory, str(directory), KEY, longest=128) as url:
        yield url


@pytest.mark.slow
def test_vllms_rewards_are_the_models_own(vllm: str, directory: Path, tmp_path: Path) -> None:
    """The ranking through /classify and through /pooling is what the model says here, also of texts that are cut."""
    out = data_directory(tmp_path / "data", RESPONSES)
    shutil.rmtree(out / "ranking")
    flags = ["--ranker", directory, "--ranker_backend=reward-server", "--ranker_url", vllm]
    assert str(directory) in tiny.succeed("scripts/preload.py", "--output_dir", out, *flags, OPENAI_API_KEY=KEY)
    tiny.succeed("scripts/rank.py", "--output_dir", out, "--pairs=3", *flags, OPENAI_API_KEY=KEY)
    rows = pq.read_table(out / "responses.parquet").to_pylist()
    found = {r["prompt_id"]: r["logits"] for r in pq.read_table(out / "ranking" / "shard-00000.parquet").to_pylist()}
    here = RewardModel(directory, "cpu", 300)
    here.reader.context = 128  # as the server's --max-model-len
    items = [(row["prompt"], [response["text"] for response in row["responses"]]) for row in rows]
    expected = dict(prompt_logits(here, items))
    assert np.abs(list(expected.values())).max() > 0.5
    for i, row in enumerate(rows):
        np.testing.assert_allclose(found[row["prompt_id"]], expected[i], atol=1e-4)


@pytest.mark.slow
def test_vllms_two_ways_agree_and_wrong_keys_and_names_are_refused(
    vllm: str, directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = recipe_of(directory, vllm)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with pytest.raises(SPPOError, match="check OPENAI_API_KEY"):
        reward_server.fetch(recipe)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    pairs = [(prompt, *both) for prompt in PROMPTS for both in permutations(["yes", "x" * 400, ""], 2)]
    expected = dict(RewardModel(directory, "cpu", 300).logits(pairs[:2]))
    found = []
    for way in reward_server._WAYS[::2]:
        with monkeypatch.context() as patch:
            patch.setattr(reward_server, "_WAYS", (way,))
            ranker = RewardServer(recipe)
            assert ranker.reader.context == 128
            assert ranker.count_cut(PROMPTS[0], ["x" * 400, "yes"]) == 2
            found.append(dict(ranker.logits(pairs)))
    assert len(found[0]) == len(pairs)
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert all(map(math.isfinite, found[0].values()))
    assert expected.keys() <= found[0].keys()
    with pytest.raises(SPPOError, match="not --ranker .*other"):
        RewardServer(recipe_of(make(tmp_path / "other", "llama"), vllm))


# a small server that answers as it is told


def classified(*numbers: float) -> tuple[int, Any]:
    return 200, {"object": "list", "data": [{"index": 0, "label": "x", "probs": list(numbers), "num_classes": 1}]}


def pooled(*numbers: float) -> tuple[int, Any]:
    return 200, {"object": "list", "data": [{"index": 0, "object": "pooling", "data": list(numbers)}]}


def embedded(*numbers: float) -> tuple[int, Any]:
    return 200, {"embedding": list(numbers), "meta_info": {"id": "x"}}


@pytest.fixture
def served(stub: tuple[type[Stub], str], directory: Path) -> tuple[type[Stub], Recipe]:
    """The stub, which serves the reward model by a name of its own; what a text's reward is, is -len(ids)."""
    server, url = stub
    server.models = [{"id": "mine", "object": "model", "root": str(directory), "max_model_len": 60}]
    server.behave = lambda n: classified(reward(server.asked[n]))
    return server, recipe_of(directory, url)


def reward(body: dict[str, Any]) -> float:
    raw = -float(len(body.get("input", body.get("input_ids"))))
    return 1 / (1 + math.exp(-raw)) if body.get("use_activation") else raw


def lengths(recipe: Recipe) -> dict[int, float]:
    """The logits of PAIRS by the stub's rewards, re-computed: the text that the template renders, tokenized."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipe.ranker)

    def length(response: str) -> int:
        chat = [*PROMPTS[0], {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        return min(60, len(tokenizer(text, add_special_tokens=False)["input_ids"]))

    return {i: float(length(b) - length(a)) for i, (_, a, b) in enumerate(PAIRS)}


@pytest.mark.parametrize(
    ("way", "answer"),
    [
        (("/classify", "input"), classified),
        (("/pooling", "input"), pooled),
        (("/pooling", "input"), lambda number: pooled([number])),  # type: ignore[arg-type]
        (("/classify", "input_ids"), embedded),
        (("/classify", "input_ids"), lambda number: (200, [embedded(number)[1]])),
    ],
)
def test_each_servers_form_is_found_and_each_text_is_asked_once(
    served: tuple[type[Stub], Recipe], way: tuple[str, str], answer: Any
) -> None:
    """vLLM's two and SGLang's: a reward without an activation is asked for, in token ids, by the server's own name."""
    server, recipe = served

    def behave(number: int) -> tuple:
        body = server.asked[number]
        if server.paths[number] != way[0]:
            return 404, {"detail": "Not Found"}
        return answer(reward(body)) if way[1] in body else (400, {"error": {"message": "no input"}})

    server.behave = behave
    ranker = RewardServer(recipe)
    server.asked.clear()
    server.paths.clear()
    assert dict(ranker.logits(PAIRS)) == pytest.approx(lengths(recipe))
    assert any(lengths(recipe).values())
    assert len(server.asked) == 3
    for body, path in zip(server.asked, server.paths, strict=True):
        assert (path, body["model"]) == (way[0], "mine")
        assert all(isinstance(token, int) for token in body[way[1]])
        assert not body.get("use_activation")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (classified(0.5, 0.5), "2 numbers for a text"),
        (pooled(), "0 numbers for a text"),
        ((200, {"data": [{"probs": [1.0]}, {"probs": [2.0]}]}), "2 numbers for a text"),
        (classified(0.7), "heeds no use_activation"),
        (classified(math.nan), "not finite numbers"),
        ((200, {"data": [{"probs": [None]}]}), "not finite numbers"),
        ((200, {"data": [{"probs": [3.0]}], "usage": {"prompt_tokens": 1}}), "reads 1 tokens where"),
        ((200, "<html>hello</html>"), "no OpenAI-compatible server"),
        ((200, {"ok": True}), "no OpenAI-compatible server"),
        ((200, []), "0 numbers for a text"),
        ((401, {"error": {"message": f"wrong key {KEY}"}}), "check OPENAI_API_KEY"),
        ((402, {"error": {"message": "pay first"}}), "does not take the request: .*pay first"),
        ((307, {"error": {"message": "moved"}}), "answers HTTP 307 and points to .*reward server"),
        ((404, {"detail": "Not Found"}), "neither /classify nor /pooling"),
        ((400, {"error": {"message": "broken tokens"}}), "does not take the request: .*broken tokens"),
        ((500, {"error": {"message": f"oh no {KEY}"}}), "asked 2 times.*run the same command"),
        ((429, {"error": {"message": "slow down"}}), "asked 2 times.*run the same command"),
    ],
)
def test_what_is_no_reward_is_one_line_before_any_work(
    served: tuple[type[Stub], Recipe], answer: tuple, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong number here would be a training on noise."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server, recipe = served
    server.behave = lambda n: answer
    recipe.ranker_retries = 1
    with pytest.raises(SPPOError, match=message) as failure:
        reward_server.fetch(recipe)
    assert KEY not in str(failure.value)
    assert len(server.asked) <= 2 * TRIALS


def test_a_small_reward_is_no_probability(served: tuple[type[Stub], Recipe], tmp_path: Path) -> None:
    """Rewards between 0 and 1 pass where the server heeds use_activation, or where the config says there is none."""
    server, recipe = served
    server.behave = lambda n: classified(0.7 if server.asked[n]["use_activation"] else 0.85)
    RewardServer(recipe)
    server.behave = lambda n: classified(3.5)  # a server that has no activation at all
    RewardServer(recipe)
    server.behave = lambda n: classified(0.7)
    plain = make(tmp_path / "plain", "llama")
    tiny.edit_json(plain / "config.json", problem_type="regression")
    server.models = [{"id": str(plain)}]
    RewardServer(recipe_of(plain, recipe.ranker_url))


@pytest.mark.parametrize("trouble", ["slow", "gone"])
def test_a_server_that_is_slow_or_gone(served: tuple[type[Stub], Recipe], trouble: str) -> None:
    server, recipe = served
    server.behave = lambda n: (*classified(1.0), 30)
    recipe.ranker_retries, recipe.ranker_timeout = 1, 0.3
    if trouble == "gone":
        recipe.ranker_url = "http://127.0.0.1:9/v1"
    with pytest.raises(SPPOError, match="the reward server at .* asked 2 times.*run the same command to go on"):
        reward_server.fetch(recipe)


def test_one_bad_text_sets_its_pairs_aside_and_a_busy_server_is_asked_again(
    served: tuple[type[Stub], Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    server, recipe = served
    ranker = RewardServer(recipe)
    asked = len(server.asked)
    first = ranker.reader._read('[{"role": "user", "content": "Why is the sky blue?"}]', "a").ids
    for answer, said in (
        ((400, {"error": {"message": "too long"}}), "a text was refused"),
        (classified(math.nan), "not a finite number"),
    ):
        ranker.server.noted.clear()
        busy = {asked: (429, {"error": {"message": "slow down"}})}

        def behave(number: int, answer: tuple = answer, busy: dict[int, tuple] = busy) -> tuple:
            body = server.asked[number]
            return busy.get(number) or (answer if body["input"] == first else classified(reward(body)))

        server.behave = behave
        found = dict(ranker.logits(PAIRS))
        assert {i for i, logit in found.items() if math.isnan(logit)} == {
            i for i, pair in enumerate(PAIRS) if "a" in pair[1:]
        }
        assert said in capsys.readouterr().err
        assert len(server.asked) == asked + 4
        asked = len(server.asked)


def test_a_server_that_cuts_long_texts_is_found_out(served: tuple[type[Stub], Recipe]) -> None:
    """SGLang's --allow-auto-truncate: the trial texts are short, and the reward of a long one was of its beginning."""
    server, recipe = served
    server.models = [{"id": recipe.ranker, "max_model_len": "400"}]  # no number: the model's own context counts

    def behave(number: int) -> tuple:
        ids = server.asked[number].get("input_ids")
        if ids is None:
            return 400, {"error": {"message": "no input_ids"}}
        return 200, {"embedding": [2.5], "meta_info": {"prompt_tokens": min(300, len(ids))}}

    server.behave = behave
    ranker = RewardServer(recipe)
    assert dict(ranker.logits([(PROMPTS[0], "a", "b")])) == {0: 0.0}
    with pytest.raises(SPPOError, match="reads 300 tokens where 4[0-9][0-9] were sent.*allow-auto-truncate"):
        list(ranker.logits([(PROMPTS[0], "q" * 400, "b")]))


def test_a_refused_conversation_and_the_same_text_twice(served: tuple[type[Stub], Recipe], tmp_path: Path) -> None:
    server, recipe = served
    strict = make(tmp_path / "strict", "llama")
    template = strict / "chat_template.jinja"
    refuse = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    template.write_text(refuse + template.read_text())
    server.models = [{"id": str(strict)}]
    ranker = RewardServer(recipe_of(strict, recipe.ranker_url))
    server.asked.clear()
    odd = ([{"role": "tool", "content": "x"}], "a", "b")
    found = dict(ranker.logits([odd, (PROMPTS[0], "a", "a")]))
    assert math.isnan(found[0])
    assert found[1] == 0
    assert len(server.asked) == 1


def test_a_server_of_another_model_and_files_that_are_not_there(
    served: tuple[type[Stub], Recipe], tmp_path: Path
) -> None:
    server, recipe = served
    server.models = [{"id": "another", "root": "/somewhere/else"}]
    with pytest.raises(SPPOError, match="serves another, not --ranker .*--served-model-name"):
        reward_server.fetch(recipe)
    with pytest.raises(UsageError, match="--ranker_url"):
        reward_server.load(Recipe(ranker=recipe.ranker))
    bare = make(tmp_path / "bare", "llama")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(SPPOError, match="no chat template"):
        reward_server.fetch(recipe_of(bare, recipe.ranker_url))
    with pytest.raises(SPPOError, match="no such directory"):
        reward_server.fetch(recipe_of(tmp_path / "none", recipe.ranker_url))
    assert not server.asked


def test_the_identity_is_what_is_read_not_where(directory: Path, tmp_path: Path) -> None:
    """A copy without weights is enough; another template is another reading."""
    first = reward_server.identity(recipe_of(directory, "http://one/v1"))
    assert first == reward_server.identity(recipe_of(directory, "http://two/v1"))
    copy = make(tmp_path / "copy", "llama")
    (copy / "model.safetensors").unlink()
    read = reward_server.identity(recipe_of(copy, "http://one/v1"))["reading"]
    assert read == first["reading"]
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert reward_server.identity(recipe_of(copy, "http://one/v1"))["reading"] != read


def test_rank_goes_through_the_command_and_goes_on_after_a_failure(
    served: tuple[type[Stub], Recipe], tmp_path: Path
) -> None:
    """Prompts whose rewards were there are in the journal, and are not asked again."""
    server, recipe = served
    out = data_directory(tmp_path / "data", [["a", "bb", "ccc"]] * 3)
    shutil.rmtree(out / "ranking")
    command = ["scripts/rank.py", "--output_dir", out, "--pairs=3", "--ranker", recipe.ranker, "--ranker_retries=0"]
    command += ["--ranker_backend=reward-server", "--ranker_url", recipe.ranker_url, "--ranker_concurrency=1"]
    trial = 2 * TRIALS
    server.behave = lambda n: classified(reward(server.asked[n])) if n < trial + 4 else (500, {"error": {}})
    done = tiny.run(*command)
    assert done.returncode == 1
    assert "run the same command to go on" in done.stderr
    assert "Traceback" not in done.stderr
    server.asked.clear()
    server.behave = lambda n: classified(reward(server.asked[n]))
    assert "2 in the journal" in tiny.succeed(*command)  # the first two prompts are the same, with the same responses
    assert len(server.asked) == trial + 3
    rows = pq.read_table(out / "ranking" / "shard-00000.parquet").to_pylist()
    assert len(rows) == 3
    np.testing.assert_allclose(rows[0]["logits"], [[0, 1, 2], [-1, 0, 1], [-2, -1, 0]])
    assert read_json(out / "ranking" / "shard-00000.manifest.json")["inputs"]["ranker"]["backend"] == "reward-server"


def test_the_preflight_asks_the_server(served: tuple[type[Stub], Recipe]) -> None:
    """It has no weights to look at: the trial and the prompts that are cut are what it can know."""
    _, recipe = served
    run = Run(dataclasses.replace(recipe, run_dir="nowhere"), [], [])
    looking = look_at_ranker(run)
    findings = []
    try:
        while True:
            findings.append(next(looking))
    except StopIteration as end:
        ranker = end.value
    assert "answers a trial question" in str(findings)
    assert (ranker.kind, ranker.parameters) == ("reward_server", 0)
    nothing: Any = None
    assert "answers a trial pair" in str(list(check_ranker(run, ranker, nothing, None, [])))

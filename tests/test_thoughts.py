"""Models that think: marks found by asking the template, responses split at them, budgets, and what had no answer."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
import tiny_thinkers
from tiny_thinkers import KINDS, MUSING, SAYING

from sppo import iterations
from sppo.cli import flags
from sppo.command.errors import SPPOError, UsageError
from sppo.generation.combine import combine
from sppo.generation.shards import generate_shards
from sppo.models import chat
from sppo.models.policy import open_policy
from sppo.models.thoughts import Marks, marks_of, split, thinking_identity
from sppo.preflight.generation import _thinking
from sppo.recipe import Recipe, load_recipe
from sppo.schema import has_answer
from sppo.store.files import read_json, write_json
from sppo.store.shards import Slice
from sppo.training.thoughts import Answer, rewritten, spells

Rows = list[dict[str, Any]]
THINK, FINAL = ("<think>", "</think>"), "<|channel|>final<|message|>"
HARMONY = ("<|channel|>analysis<|message|>", f"<|end|><|start|>assistant{FINAL}")
AGAIN = "<|end|><|start|>assistant"  # between two messages
TAGS = {"special": THINK, "plain": ("<ponder>", "[done]"), "opened": THINK, "channels": HARMONY}


@pytest.fixture(scope="module")
def thinkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model of each kind."""
    root = tmp_path_factory.mktemp("thinkers")
    for kind in KINDS:
        tiny_thinkers.thinker(root / kind, kind)
    return root


def load(directory: Path) -> Any:
    return chat.load_tokenizer(directory)


def found(directory: Path, tags: str = "auto", **kwargs: Any) -> Marks | None:
    tokenizer = load(directory)
    return marks_of(tokenizer, chat.stop_token_ids(directory, tokenizer), kwargs, tags)


# The marks


@pytest.mark.parametrize("kind", KINDS)
def test_the_template_shows_the_marks(thinkers: Path, kind: str) -> None:
    marks = found(thinkers / kind)
    assert marks is not None
    assert (marks.open, marks.close) == TAGS[kind]
    assert marks.is_open == (kind == "opened")
    assert marks.header == (FINAL if kind == "channels" else "")
    assert marks.ending == KINDS[kind].ending
    tokenizer = load(thinkers / kind)
    assert (tokenizer.decode(marks.open_ids), tokenizer.decode(marks.close_ids)) == TAGS[kind]
    assert (len(marks.close_ids) == 1) == (kind in ("special", "opened"))
    assert thinking_identity("auto", thinkers / kind, {}) == {"thinking": list(TAGS[kind])}


def test_thinking_that_is_switched_off_has_no_marks(thinkers: Path) -> None:
    """The template closes an empty thought in the prompt, so what is drawn is the answer."""
    for kind in ("special", "opened"):
        assert found(thinkers / kind, enable_thinking=False) is None
        assert thinking_identity("auto", thinkers / kind, {"enable_thinking": False}) == {}
    assert found(thinkers / "special", "off") is None


def test_models_that_do_not_think_have_none(models: Path) -> None:
    for family in ("llama3", "mistral", "gemma2"):
        assert found(models / family) is None
        assert thinking_identity("auto", models / family, {}) == {}
    marks = found(models / "llama3", "<think>, </think>")  # what a system prompt asks for
    assert marks is not None
    assert (marks.open, marks.close, marks.is_open) == (*THINK, False)
    assert len(marks.close_ids) > 1


TURNS = "{% for m in messages %}{{ '<u>' + m['content'] + '<e>' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
DROPS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<a>' + m['content'].split('</think>')[-1] + '<e>' }}"
    "{% else %}{{ '<u>' + m['content'] + '<e>' }}{% endif %}{% endfor %}"
)
SWAPS = "{% if add_generation_prompt %}{{ '<a>' + ('<think>' if thinking else '</think>') }}{% endif %}"
PARTS = (
    "{% for m in messages %}{% if m['content'] is string %}{{ '<u>' + m['content'] + '<e>' }}{% else %}"
    "{% for b in m['content'] %}{{ b['text'] if b['type'] == 'text' else '[THINK]' + b['thinking'] + '[/THINK]' }}"
    "{% endfor %}{% endif %}{% endfor %}"
)
AROUND = (  # Hunyuan's
    "{% for m in messages %}{{ '<u>' }}{% if m['reasoning_content'] %}{{ '<think>\n' + m['reasoning_content'] + "
    "'\n</think>\n<answer>\n' }}{% endif %}{{ m['content'] + '<e>' }}{% endfor %}"
)
TOLD = "{% if thinking %}{{ 'Think between <think></think>.' }}{% endif %}"
STRIPS = (
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and '<channel|>' in c %}"
    "{% set c = c.split('<|channel>')[0] + c.split('<channel|>')[-1] %}{% endif %}{{ '<u>' + c + '<e>' }}{% endfor %}"
    "{# '<|channel>thought' #}"
)


@pytest.mark.parametrize(
    ("template", "kwargs", "expected"),
    [
        (DROPS + PROMPT, {}, (*THINK, False)),  # a thought of an earlier turn is left out, as DeepSeek-R1's
        (DROPS + PROMPT.replace("<a>", "<a><think>\n"), {}, (*THINK, True)),
        (TURNS + PROMPT.replace("<a>", "<a><think>\n"), {}, (*THINK, True)),
        (TURNS + SWAPS, {"thinking": True}, (*THINK, True)),  # DeepSeek-V3.1
        (TURNS + SWAPS, {}, None),
        (PARTS + PROMPT, {}, ("[THINK]", "[/THINK]", False)),  # Magistral
        (AROUND + PROMPT.replace("<a>", "<u>"), {}, (*THINK, False)),
        (TOLD + TURNS + PROMPT, {"thinking": True}, (*THINK, False)),  # Granite
        (TOLD + TURNS + PROMPT, {}, None),
        (STRIPS + PROMPT, {}, ("<|channel>thought", "<channel|>", False)),  # Gemma-4
        (TURNS + PROMPT, {}, None),
    ],
)
def test_other_ways_in_which_templates_think(
    models: Path, template: str, kwargs: dict[str, Any], expected: Any
) -> None:
    tokenizer = load(models / "qwen3")
    tokenizer.chat_template = template
    marks = marks_of(tokenizer, {0}, kwargs, "auto")
    assert (marks and (marks.open, marks.close, marks.is_open)) == expected


LLAMA = (  # the prompt ends as an answer begins
    "{# reasoning #}{% for m in messages %}{{ '<' + m['role'] + '>\n' + (m['content'] | trim) + '<e>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)
DUMPS = LLAMA.replace("(m['content'] | trim)", "(m | tojson)")
NONE = TURNS + PROMPT.replace("<a>", "<a><|no_think|>")
FAST = TURNS + "{% if add_generation_prompt %}{{ '<a>' if enable_thinking | default(true) else '<fast>' }}{% endif %}"
NEMOTRON = LLAMA.replace(
    "(m['content'] | trim)", "(m['content'].split('</think>')[-1] if m['content'] is string else m['content'] | trim)"
)


@pytest.mark.parametrize(
    ("template", "expected"), [(LLAMA, None), (DUMPS, None), (FAST, None), (NONE, None), (NEMOTRON, (*THINK, False))]
)
def test_what_is_no_mark_is_taken_for_none(models: Path, template: str, expected: Any) -> None:
    """A list of parts as Python or JSON prints it, and another beginning of an answer."""
    tokenizer = load(models / "qwen3")
    tokenizer.chat_template = template
    marks = marks_of(tokenizer, {0}, {}, "auto")
    assert (marks and (marks.open, marks.close, marks.is_open)) == expected


REAL = {
    "deepseek_r1_distill": (*THINK, True),
    "deepseekv3": (*THINK, True),
    "gemma4": ("<|channel>thought", "<channel|>", False),
    "glm4moe": (*THINK, False),
    "gptoss": (*HARMONY, False),
    "lfm2_2_5": (*THINK, False),
    "nemotron_3_nano": (*THINK, True),
    "qwen3": (*THINK, False),
    "qwen3_5_think": (*THINK, True),
    "qwen3_5_nothink": None,
    "qwen2_5": None,
    "llama3_2": None,
    "phi3": None,
}


@pytest.mark.parametrize("name", REAL)
def test_the_marks_of_real_templates(models: Path, name: str) -> None:
    """As trl ships them."""
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"this trl has no {name}")
    tokenizer = copy.deepcopy(load(models / "qwen3"))
    tokenizer.chat_template = path.read_text()
    marks = marks_of(tokenizer, {0}, {}, "auto")
    assert (marks and (marks.open, marks.close, marks.is_open)) == REAL[name]


def test_a_mark_that_stops_generation_is_refused(thinkers: Path) -> None:
    """gpt-oss's <|end|> as a stop token: each response would be a thought, and nothing would say why."""
    tokenizer = load(thinkers / "channels")
    stops = {*chat.stop_token_ids(thinkers / "channels", tokenizer), tokenizer.convert_tokens_to_ids("<|end|>")}
    with pytest.raises(SPPOError, match=r"generation stops at <\|end\|>.*eos_token_id"):
        marks_of(tokenizer, stops, {}, "auto")


# Splitting


@pytest.mark.parametrize(
    ("kind", "written", "thought", "text", "answer_begins"),
    [
        ("special", "<think>\nhmm well\n</think>\n\nred blue<|im_end|>", "hmm well", "red blue", "red"),
        ("special", "<think>\n\n</think>\n\nred<|im_end|>", "", "red", "red"),
        ("special", "red blue<|im_end|>", None, "red blue", None),
        ("special", "hmm</think>red</think> blue", "hmm", "red blue", "red"),  # a special token is not in the text
        ("special", "red <think> hmm</think> blue", "red <think> hmm", "blue", " blue"),
        ("special", "<think>hmm</think><|im_end|>", "hmm", "", "<|im_end|>"),
        ("special", "<think>hmm", "hmm", "", ""),
        ("special", "<think>hmm<|im_end|>", "hmm", "", ""),
        ("special", "<think>hmm</think>\n\n", "hmm", "", ""),
        ("special", "red. <think> hmm", "red. <think> hmm", "", ""),
        ("opened", "hmm\n</think>\n\nred<|im_end|>", "hmm", "red", "red"),
        ("opened", "hmm red", "hmm red", "", ""),
        ("plain", "<ponder> hmm[done] red<|im_end|>", "hmm", "red", " red"),
        ("plain", "<ponder> hmm[done", "hmm[done", "", ""),
        ("plain", "red [done] blue", "red", "blue", " blue"),
        ("channels", f"{HARMONY[0]}hmm{HARMONY[1]}red<|im_end|>", "hmm", "red", "red"),
        ("channels", f"{HARMONY[0]}hmm{AGAIN}{HARMONY[0]}well{HARMONY[1]}red", "hmm\n\nwell", "red", "red"),
        ("channels", f"{FINAL}red<|im_end|>", "", "red", "red"),
        ("channels", f"{HARMONY[0]}hmm", "hmm", "", ""),
        ("channels", "<|channel|>commentary<|message|>hmm", "<|channel|>commentary<|message|>hmm", "", ""),
    ],
)  # fmt: skip
def test_a_response_is_split(
    thinkers: Path, kind: str, written: str, thought: str | None, text: str, answer_begins: str | None
) -> None:
    tokenizer, marks = load(thinkers / kind), found(thinkers / kind)
    assert marks is not None
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    told = split(marks, tokenizer, ids)
    assert (told.thought, told.text) == (thought, text)
    response = {"token_ids": ids, "thought_tokens": told.thought_tokens}
    assert told.finished == has_answer(response) == (answer_begins != "")
    if answer_begins is None:
        assert told.thought_tokens is None
    else:
        assert tokenizer.decode(ids[told.thought_tokens :]).startswith(answer_begins)
        assert not tokenizer.decode(ids[: told.thought_tokens]).endswith(answer_begins or "nothing")


def test_a_mark_whose_end_is_one_token_with_what_follows(models: Path) -> None:
    """Qwen's tokenizers make one token of >\\n\\n, so the mark's own ids are nowhere among those that were drawn."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(kinds.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[<>/]+[\n(]*|\w+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["</think>\n\nred", "</think>(red"] * 20,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", bos_token="<e>")  # noqa: S106
    tokenizer.chat_template = load(models / "qwen3").chat_template
    marks = marks_of(tokenizer, {0}, {}, ",".join(THINK))
    assert marks is not None

    ids = tokenizer("<think>hmm</think>\n\nred<e>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[-4:]) == "think>\n\nred<e>"
    assert split(marks, tokenizer, ids) == ("hmm", "red", len(ids) - 2, True)
    ids = tokenizer("<think>hmm</think>(red<e>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[-3:]) == ">(red<e>"  # this token is the answer's too
    assert split(marks, tokenizer, ids) == ("hmm", "(red", len(ids) - 3, True)


@pytest.mark.parametrize("is_byte_level", [True, False])
def test_an_answer_that_begins_within_the_marks_last_token_is_whole(models: Path, is_byte_level: bool) -> None:
    """That token may hold half a character; and a decoder leaves out the space before the first token it is given."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    space: Any = pre_tokenizers.ByteLevel if is_byte_level else pre_tokenizers.Metaspace
    options = {"add_prefix_space": False, "use_regex": False} if is_byte_level else {"prepend_scheme": "never"}
    alphabet = [*pre_tokenizers.ByteLevel.alphabet()] if is_byte_level else [*"</>()abcdehiklmnoprstu▁"]
    merge = (">", "Ã") if is_byte_level else (">", "(")  # é is Ã and ©
    vocab = {token: n for n, token in enumerate(["<e>", *alphabet, "".join(merge)])}
    made = Tokenizer(kinds.BPE(vocab, [merge]))
    made.pre_tokenizer = space(**options)
    made.decoder = decoders.ByteLevel() if is_byte_level else decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>")  # noqa: S106
    tokenizer.add_special_tokens({"eos_token": "<e>"})
    tokenizer.chat_template = load(models / "qwen3").chat_template
    marks = marks_of(tokenizer, {0}, {}, ",".join(THINK))
    assert marks is not None
    said = "é red" if is_byte_level else "( red"
    ids = tokenizer(f"<think>hmm</think>{said}", add_special_tokens=False)["input_ids"]
    assert "".join(merge) in tokenizer.convert_ids_to_tokens(ids)
    told = split(marks, tokenizer, [*ids, 0])
    assert told == ("hmm", said, len("<think>hmm</think>") - 1, True)
    # training finds the answer there again, and an edited one keeps the mark
    response = {"token_ids": [*ids, 0], **told._asdict()}
    assert spells(tokenizer, {0}, response, Answer(said, "hmm"))
    assert not spells(tokenizer, {0}, response, Answer("thin", "hmm"))
    made = rewritten(tokenizer, {0}, response["token_ids"], response["thought_tokens"], said, "thin")
    assert tokenizer.decode(made) == "<think>hmm</think>thin<e>"


# Drawing


@pytest.fixture
def recipe(thinkers: Path, tmp_path: Path) -> Recipe:
    path = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Why {n}?"} for n in range(9)])
    model = str(thinkers / "special")
    return Recipe(model=model, prompts=str(path), pairs=3, maxlen=12, engine="transformers", temperature=1.0, top_p=1.0)


def drawn(recipe: Recipe, out: Path) -> Rows:
    generate_shards(recipe, out, [Slice(0, 0)], False)
    return pq.read_table(out / "responses.parquet").to_pylist()


def responses(rows: Rows) -> Rows:
    return [response for row in rows for response in row["responses"]]


def words(text: str) -> set[str]:
    return set(text.split())


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_thoughts_are_told_apart_where_they_are_drawn(
    thinkers: Path, recipe: Recipe, tmp_path: Path, kind: str
) -> None:
    recipe.model = str(thinkers / kind)
    tokenizer = load(thinkers / kind)
    rows = drawn(recipe, tmp_path / "on")
    for r in responses(rows):
        whole = tokenizer.decode(r["token_ids"])
        assert r["thought"] is not None
        assert words(r["thought"]).isdisjoint(SAYING)
        assert words(r["thought"]) <= {*MUSING} or not has_answer(r)  # cut within its mark
        assert words(r["text"]) <= {*SAYING}
        assert has_answer(r) == bool(r["text"])
        assert has_answer(r) <= (KINDS[kind].ending.strip() in whole)
        assert words(tokenizer.decode(r["token_ids"][r["thought_tokens"] :])) <= {*SAYING, "red<|im_end|>"} | {
            f"{word}<|im_end|>" for word in SAYING
        }
        assert r["logps"] is None or len(r["logps"]) == len(r["token_ids"])

    manifest = read_json(tmp_path / "on" / "responses.manifest.json")
    assert manifest["generated"]["thinking"] == list(TAGS[kind])
    assert manifest["counts"]["unfinished_thoughts"] == sum(not has_answer(r) for r in responses(rows)) > 0
    assert manifest["counts"]["thought_tokens"] == sum(r["thought_tokens"] for r in responses(rows))

    # the same draws, as they were before anything was told apart
    whole = drawn(replace(recipe, thinking_tags="off"), tmp_path / "off")
    assert [r["token_ids"] for r in responses(whole)] == [r["token_ids"] for r in responses(rows)]
    assert all(r["thought"] is None and any(word in r["text"] for word in MUSING) for r in responses(whole))
    assert "thinking" not in read_json(tmp_path / "off" / "responses.manifest.json")["generated"]


def test_a_model_that_does_not_think_is_drawn_from_as_before(models: Path, recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, model=str(models / "llama3"), maxlen=6)
    assert drawn(recipe, tmp_path / "auto") == drawn(replace(recipe, thinking_tags="off"), tmp_path / "off")
    manifests = [read_json(tmp_path / name / "responses" / "shard-00000.manifest.json") for name in ("auto", "off")]
    for key in ("inputs", "settings", "outputs", "counts"):
        assert manifests[0][key] == manifests[1][key]
    assert not {"thinking", "thinking_tags", "thinking_budget"} & {*manifests[0]["settings"]}


@pytest.mark.parametrize(("engine", "kinds"), [("transformers", [*KINDS]), ("vllm", ["special", "plain", "channels"])])
def test_a_budget_ends_thoughts_and_goes_on_to_the_answer(
    thinkers: Path, recipe: Recipe, tmp_path: Path, engine: str, kinds: list[str]
) -> None:
    """Each thought that is longer is cut at the budget, with one end behind it, and none is left without an answer."""
    pytest.importorskip(engine)
    recipe = replace(recipe, engine=engine, maxlen=40, thinking_budget=7)
    for kind in kinds:
        mine = replace(recipe, model=str(thinkers / kind))
        tokenizer, out = load(thinkers / kind), tmp_path / kind
        rows = drawn(mine, out)
        cut, close = 0, TAGS[kind][1]
        for r in responses(rows):
            whole = tokenizer.decode(r["token_ids"])
            assert whole.count(close) == 1, whole
            assert words(r["thought"]) <= {*MUSING}, whole
            assert words(r["text"]) <= {*SAYING}
            assert has_answer(r)
            if r["logps"] is None:  # of so few prompts all have log-probs, but for tokens that were not drawn
                cut += 1
            else:
                assert len(r["logps"]) == len(r["token_ids"])
        counts = read_json(out / "responses.manifest.json")["counts"]
        assert counts["thoughts_cut_at_budget"] == cut > 0
        assert counts["unfinished_thoughts"] == 0
        assert read_json(out / "responses.manifest.json")["generated"]["thinking_budget"] == 7


def test_what_is_refused_is_refused_before_anything_is_deleted(thinkers: Path, recipe: Recipe, tmp_path: Path) -> None:
    """--overwrite with marks that would stop generation, or a budget that would end nothing."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(thinkers / "channels", model)
    end = load(model).convert_tokens_to_ids("<|end|>")
    config = read_json(model / "generation_config.json")
    write_json(model / "generation_config.json", {**config, "eos_token_id": [*config["eos_token_id"], end]})
    asked = replace(recipe, model=str(model), thinking_tags="off")
    rows = drawn(asked, out)
    with pytest.raises(SPPOError, match="generation stops at"):
        generate_shards(replace(asked, thinking_tags="auto"), out, [Slice(0, 0)], True)
    assert pq.read_table(out / "responses" / "shard-00000.parquet").to_pylist() == rows
    off = replace(recipe, thinking_tags="<think>,</think>", chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(SPPOError, match=r"--thinking_budget 5: .*nothing is thought"):
        generate_shards(replace(off, thinking_budget=5), tmp_path / "no", [Slice(0, 0)], False)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("other", [{"thinking_budget": 7}, {"thinking_tags": "off"}])
@pytest.mark.parametrize("is_first", [True, False])
def test_shards_that_told_thoughts_apart_otherwise_are_not_put_together(
    recipe: Recipe, tmp_path: Path, other: dict[str, Any], is_first: bool
) -> None:
    """A setting that one of them has, and the other leaves out."""
    recipes = [recipe, replace(recipe, **other)]
    if is_first:
        recipes.reverse()
    for shard, each in enumerate(recipes):
        out = tmp_path / "out" if not shard else tmp_path / "there"
        generate_shards(each, out, [Slice(0, shard, 2)], False)
    for path in (tmp_path / "there" / "responses").glob("shard-00001.*"):
        shutil.copy(path, tmp_path / "out" / "responses")
    with pytest.raises(SPPOError, match=r"shards 0 and 1 differ in .*thinking"):
        combine(tmp_path / "out", 2, recipe.pairs, False)


@pytest.mark.parametrize("budget", [0, 7])
def test_a_turn_that_switches_thinking_off_does_so_for_its_prompt(
    thinkers: Path, recipe: Recipe, tmp_path: Path, budget: int
) -> None:
    """Nemotron's templates open a thought, and close an empty one where a turn says /no_think."""
    model = tmp_path / "model"
    shutil.copytree(thinkers / "opened", model)
    tokenizer = load(model)
    assert "enable_thinking is defined and not enable_thinking" in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "enable_thinking is defined and not enable_thinking", "'/no_think' in messages[-1]['content']"
    )
    tokenizer.save_pretrained(model)
    prompts = [{"prompt": f"Why {n}?" + " /no_think" * (n % 2)} for n in range(8)]
    tiny.write_jsonl(Path(recipe.prompts), prompts)
    rows = drawn(replace(recipe, model=str(model), maxlen=40, thinking_budget=budget), tmp_path / "out")
    for row in rows:
        is_off = "/no_think" in row["prompt"][-1]["content"]
        for r in row["responses"]:
            assert (r["thought"] is None) == (r["thought_tokens"] is None) == is_off
            assert has_answer(r)
            assert words(r["text"]) <= {*SAYING}
            assert r["text"]
            if is_off:
                assert r["logps"] is not None  # nothing was put into it
    counts = read_json(tmp_path / "out" / "responses.manifest.json")["counts"]
    assert (counts["thoughts_cut_at_budget"] > 0) == (budget > 0)


def test_marks_that_are_the_templates_own_are_ended_as_it_writes_them(thinkers: Path) -> None:
    """Else two recipes with one identity would go on with each other's work, and end thoughts otherwise."""
    for kind, tags in TAGS.items():
        assert found(thinkers / kind, ",".join(tags)) == found(thinkers / kind)


def test_a_budget_changes_no_draw_before_it_is_used_up(recipe: Recipe, tmp_path: Path) -> None:
    """On transformers each token's random number is its place's."""
    recipe = replace(recipe, maxlen=24)
    free = responses(drawn(recipe, tmp_path / "free"))
    held = responses(drawn(replace(recipe, thinking_budget=9), tmp_path / "held"))
    for a, b in zip(free, held, strict=True):
        same = 9 if b["logps"] is None else len(a["token_ids"])
        assert a["token_ids"][:same] == b["token_ids"][:same]
    assert any(b["logps"] is None for b in held)
    assert any(b["logps"] is not None for b in held)


def test_a_budget_without_a_thought_is_refused(models: Path, thinkers: Path, recipe: Recipe, tmp_path: Path) -> None:
    for model, kwargs in ((models / "llama3", {}), (thinkers / "special", {"enable_thinking": False})):
        asked = replace(recipe, model=str(model), thinking_budget=5, chat_template_kwargs=kwargs)
        with pytest.raises(
            SPPOError, match=r"--thinking_budget 5: .*no marks of a thought.*--thinking_tags OPEN,CLOSE"
        ):
            generate_shards(asked, tmp_path / "out", [Slice(0, 0)], False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="below --maxlen 24"):
        load_recipe(None, {"maxlen": 24, "thinking_budget": 24})
    with pytest.raises(UsageError, match="--thinking_tags off"):
        load_recipe(None, {"thinking_tags": "off", "thinking_budget": 24})


# Older work, and work that was killed


def test_work_that_began_without_splitting_goes_on_so(recipe: Recipe, tmp_path: Path) -> None:
    """An older version's run: its shards and its recipes name no marks."""
    older, out = replace(recipe, thinking_tags="off"), tmp_path / "out"
    generate_shards(older, out, [Slice(0, 0, 2)], False)
    generate_shards(recipe, out, [Slice(0, 0, 2), Slice(0, 1, 2)], False)  # done, and as the first shard was made
    for shard in range(2):
        assert "thinking" not in read_json(out / "responses" / f"shard-0000{shard}.manifest.json")["settings"]
    with pytest.raises(SPPOError, match=r"settings\.thinking: null there"):
        generate_shards(replace(recipe, thinking_tags="<a>,<b>"), out, [Slice(0, 0, 2)], False)

    whole = iterations.opened(replace(recipe, run_dir=str(tmp_path / "run")))
    assert whole.thinking_tags == "auto"
    first = iterations.iteration(whole, 1)
    Path(first.run_dir, "iter1").mkdir(parents=True)
    iterations.write(first)
    assert iterations.opened(whole).thinking_tags == "auto"
    path = iterations.path_of(first)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "thinking" not in line))
    assert iterations.opened(replace(whole, date="")).thinking_tags == "off"
    assert iterations.of_run(first).thinking_tags == "off"  # a report by hand: the first model's answers are whole
    assert iterations.opened(replace(whole, thinking_tags="<a>,<b>")).thinking_tags == "<a>,<b>"


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0, 9])
def test_killed_in_the_middle_of_a_shard_it_ends_the_same(recipe: Recipe, tmp_path: Path, budget: int) -> None:
    tiny.write_jsonl(Path(recipe.prompts), [{"prompt": f"Why {n}?"} for n in range(120)])
    recipe = replace(recipe, maxlen=24, thinking_budget=budget)
    undisturbed, out = drawn(recipe, tmp_path / "calm"), tmp_path / "killed"
    keys = ("model", "prompts", "pairs", "maxlen", "engine", "temperature", "top_p", "thinking_budget")
    command = [tiny.sys.executable, "scripts/generate.py", *flags(**{key: getattr(recipe, key) for key in keys})]
    command += flags(output_dir=out)
    journal = out / "responses" / "shard-00000.journal"
    process = tiny.start(*command, slow=out)
    tiny.kill_when(process, lambda: journal.exists() and journal.read_bytes().count(b"\n") > 30)
    assert " 0 in the journal" not in tiny.succeed(*command)
    assert pq.read_table(out / "responses.parquet").to_pylist() == undisturbed


def test_the_preflight_says_what_it_found(models: Path, thinkers: Path) -> None:
    def said(model: Path, **settings: Any) -> list[tuple[str, str]]:
        policy = open_policy(str(model))
        return [(one.level, one.text) for one in _thinking(Recipe(**settings), policy, policy.tokenizer())]

    ((level, text),) = said(thinkers / "opened")
    assert (level, text) == (
        "ok",
        "this template thinks: <think> … </think>, opened in the prompt; the ranker sees the answer alone",
    )
    ((level, text),) = said(thinkers / "special", thinking_tags="off")
    assert (level, "a thought is a part of the answer" in text) == ("note", True)
    ((level, text),) = said(thinkers / "special", thinking_budget=9)
    assert (level, "ended after 9 tokens" in text) == ("ok", True)
    ((level, text),) = said(models / "llama3", thinking_budget=9)
    assert (level, "no marks of a thought" in text) == ("no", True)
    assert said(models / "llama3") == []

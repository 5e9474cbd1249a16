"""report.html: whatever a run has written is on it, a model's text is never run, and a real browser shows it."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from sppo.command.errors import SPPOError
from sppo.evaluation.page.gather import gather
from sppo.evaluation.page.page import warnings, write_comparison, write_page
from sppo.schema import responses_schema, training_schema

EVIL = [
    "<script>document.title = 'pwned'</script>",
    '<img src="x" onerror="document.title = \'pwned\'">',
    "</div></section><h1>out</h1>",
    "\"'><svg onload=\"document.title = 'pwned'\">",
    "{{ 7 * 7 }} {% raw %} $E=mc^2$ \x00 half a character",
]
ALL = ("Win rates", "Win matrix", "Measures", "Training", "Log-ratios", "Win rates of pairs", "Lengths",
       "Benchmark suites", "Data", "Time and tokens")  # fmt: skip
TABLES = ("Benchmark suites", "Data", "Time and tokens")  # without a picture
# one of the win rates, two matrices (ranker's, judge's), four kinds of measures, loss twice and margin, log-ratios,
# rates and lengths of two iterations
PICTURES = 1 + 2 + 4 + 3 + 1 + 2 * 2


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def answers(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt_id": f"p{n}",
            "prompt": [{"role": "user", "content": f"Question {n} about {text}"}],
            "responses": [{"text": t, "token_ids": [1, 2], "finish_reason": "stop"} for t in (text, f"second {text}")],
        }
        for n, text in enumerate(texts)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=responses_schema()), path)


def matrix(count: int, step: float) -> dict[str, list[list[float]]]:
    """Each model beats the one before it by `step`, and at equal length by half of it."""

    def table(step: float, shift: float = 0.0) -> list[list[float]]:
        return [[0.5 + step * (i - j) + shift for j in range(count)] for i in range(count)]

    low, high = table(step, -0.01), table(step, 0.01)
    return {"win_rates": table(step), "low": low, "high": high, "length_controlled": table(step / 2)}


def make_run(run: Path, iterations: int = 2, apart: float = 1e-6) -> Path:
    """A run's files as its stages write them, of two prompts and three steps an iteration."""
    base = {"mean_tokens": 20.0, "empty": 0.0, "repeated": 0.1, "cut": 0.0, "followed": 0.3, "base_perplexity": 4.0}
    answers(run / "iter0/eval/responses.parquet", EVIL)
    dump(run / "iter0/eval/measures.json", base)
    rows, losses = [], {"loss": 3.5, "beta2_loss": 0.035}
    for i in range(1, iterations + 1):
        here = run / f"iter{i}"
        dump(here / "recipe.yaml", {"model": "org/model", "beta": 0.1, "iterations": iterations, "seed": i})
        counts = {"written": 2, "skipped": {"empty": 1}, "responses": 4, "response_tokens": 80, "cut_at_maxlen": 0}
        dump(here / "data/responses.manifest.json", {"counts": counts, "versions": {"torch": "2"}, "seconds": 0.1})
        dump(here / "data/responses/shard-00000.manifest.json", {"counts": counts, "seconds": 60.0})
        paired = {"train": 2, "prompts": 2, "pairs": 4, "dropped": {"same text": 0}, "tied_pairs": 1}
        paired |= {"intransitive_triples": 0.0, "position_bias": 0.01, "score_length_correlation": 0.2}
        dump(here / "data/train.manifest.json", {"counts": paired, "seconds": 1.0})
        row: dict[str, Any] = {"chosen_probs": 0.9, "chosen_probs_win": 0.7, "chosen_probs_lose": 0.2}
        responses = [{"text": "a", "token_ids": [1] * 9}, {"text": "b", "token_ids": [1] * 4}]
        row |= {"responses": responses, "chosen_index": 0, "rejected_index": 1}
        pq.write_table(pa.Table.from_pylist([row, row], schema=training_schema()), here / "data/train.parquet")
        targets = {"rewards/chosen_target": 0.2, "rewards/rejected_target": -0.2}
        moved = ("rewards/margins", "rewards/chosen", "rewards/rejected")
        steps = [
            {
                "step": s,
                "tokens_per_second": 50.0,
                "loss": 9.0 / s,
                "beta2_loss": 0.09 / s,
                **dict.fromkeys(moved, 0.01 * s),
                **targets,
            }
            for s in (1, 2, 3)
        ]
        dump(here / "model/sppo_manifest.json", {
            "loss": 3.0, "seconds": 90.0, "counts": {"responses_cut": 0},
            "agreement": {"mean_difference": apart, "largest_difference": 2 * apart},
        })  # fmt: skip
        (here / "model/metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
        answers(here / "eval/responses.parquet", [t + f" in {i}" for t in EVIL])
        row = {"iteration": i, "prompts": 5, "ranker_win_rate": 0.5 + 0.1 * i, "base_mean_tokens": 20.0}
        rows.append({**row, "ranker_interval": [0.5, 0.8], **base, "mean_tokens": 20.0 - i, "base": base, **losses})
    dump(run / "summary.json", rows)
    models = [f"iter{i}" for i in range(iterations + 1)]
    dump(run / "matrix.json", {
        "models": models, "prompts": 5, **matrix(iterations + 1, 0.1),
        "mean_tokens": [20.0 - i for i in range(iterations + 1)],
        "judge": {"name": "<i>j</i>", **matrix(iterations + 1, 0.02)},
        "von_neumann": {"mixture": [0.25, *[0.0] * (iterations - 1), 0.75], "value": 0.5},
    })  # fmt: skip
    suite = {"suite": "mt_bench", "model": "m", "judge": "<b>judge</b>", "questions": 80}
    suite["published"] = {"<b>model</b>": {"turn 1": 7.5}}
    for i in range(iterations):  # the last iteration has not been asked
        dump(run / f"iter{i}/suites/mt_bench/figures.json", {**suite, "figures": {"turn 1": 5.25 + i}})
    (run / "logs").mkdir()
    (run / "logs/commands.log").write_text("2026-01-01 00:00:00 bash scripts/run.sh --model '<b>'\n")
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run of two iterations."""
    return write_page(make_run(tmp_path_factory.mktemp("page") / "run")).read_text()


class Tables(HTMLParser):
    """The cells of each section's table, by the section's title."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self._title, self._inside = "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._inside = tag
        if tag == "h2":
            self._title = ""
        if tag == "tr":
            self.found.setdefault(self._title, []).append([])
        if tag in ("th", "td"):
            self.found[self._title][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "h2":
            self._title += data
        if self._inside in ("th", "td"):
            self.found[self._title][-1][-1] += data


def test_every_section_has_its_pictures(page: str) -> None:
    for title in ALL:
        assert f"<h2>{title}</h2>" in page
    assert page.count("<figure") == len(ALL) - len(TABLES)
    assert page.count("<svg") == PICTURES


def test_the_tables_hold_what_the_run_wrote(page: str) -> None:
    found = Tables(page).found
    assert found["Win rates"] == [
        ["iteration", "ranker_win_rate", "mean_tokens", "empty", "repeated", "cut", "followed", "base_perplexity",
         "loss", "beta2_loss"],
        ["0", "", "20", "0.0%", "10.0%", "0.0%", "30.0%", "4", "", ""],
        ["1", "60.0%", "19", "0.0%", "10.0%", "0.0%", "30.0%", "4", "3.5", "0.035"],
        ["2", "70.0%", "18", "0.0%", "10.0%", "0.0%", "30.0%", "4", "3.5", "0.035"],
    ]  # fmt: skip
    assert found["Win matrix"] == [
        ["", "iter0", "iter1", "iter2"],
        ["mean tokens", "20", "19", "18"],
        ["win rate of iter1 at equal length, %", "55.0", "50.0", "45.0"],
        ["win rate of iter2 at equal length, %", "60.0", "55.0", "50.0"],
        ["win rate of iter1 at equal length, % (<i>j</i>)", "51.0", "50.0", "49.0"],
        ["win rate of iter2 at equal length, % (<i>j</i>)", "52.0", "51.0", "50.0"],
        ["share of the mixture that no model and no mixture beats, %", "25.0", "0.0", "75.0"],
    ]
    assert found["Benchmark suites"] == [
        ["suite", "figure", "first model", "iteration 1", "published: <b>model</b>"],
        ["mt_bench, judged by <b>judge</b>", "turn 1", "5.25", "6.25", "7.5"],
    ]
    assert found["Data"] == [
        ["", "iteration 1", "iteration 2"],
        ["prompts answered", "2", "2"],
        ["prompts skipped", "1", "1"],
        ["responses", "4", "4"],
        ["responses cut at maxlen, %", "0", "0"],
        ["pairs to train on", "2", "2"],
        ["pairs dropped", "0", "0"],
        ["ties among comparisons, %", "50", "50"],
        ["share of triples that go in a circle", "0", "0"],
        ["position bias", "0.01", "0.01"],
        ["correlation of score and length", "0.2", "0.2"],
        ["responses cut for training", "0", "0"],
        ["log-probs of engine and trainer apart, mean", "1e-06", "1e-06"],
        ["the same, largest of a response", "2e-06", "2e-06"],
    ]
    assert found["Time and tokens"] == [
        ["", "iteration 1", "iteration 2"],
        ["generate, seconds", "60", "60"],
        ["pair, seconds", "1", "1"],
        ["train, seconds", "90", "90"],
        ["tokens drawn", "80", "80"],
        ["tokens drawn a second", "1.333", "1.333"],
        ["training's tokens a second", "50", "50"],
    ]
    assert dict(found["Settings"]) == {"model": "org/model", "beta": "0.1", "iterations": "2", "seed": "1"}


def test_the_top_says_what_came_out(page: str) -> None:
    assert "2 of 2 iterations are trained" in page
    assert "Iteration 2 wins 70.0% of comparisons with the first model (95% interval 50.0 to 80.0%)" in page
    assert "<dt>mean_tokens</dt><dd>20 → 18</dd>" in page
    assert 'class="warning"' not in page


def test_the_end_says_how_it_was_made(page: str) -> None:
    assert "<code>2026-01-01 00:00:00 bash scripts/run.sh --model &#39;&lt;b&gt;&#39;</code>" in page
    assert "torch 2" in page


def test_a_models_text_is_data(tmp_path: Path) -> None:
    """Neither is a run's name, a judge's or a measure's markup, which stand in pictures too."""
    run = make_run(tmp_path / "<img src=x onerror=alert(1)>")
    for path in (run / "iter0/eval/measures.json", run / "summary.json"):
        path.write_text(path.read_text().replace('"followed"', '"</text><img src=x>-->"'))
    text = write_page(run).read_text()
    assert len(re.findall("<script", text)) == 1
    for evil in ("<img", "<i>j", "<b>model", '<svg onload="', "<h1>out"):
        assert evil not in text, evil
    assert "&lt;script&gt;document.title" in text
    assert "{{ 7 * 7 }} {% raw %}" in text
    assert "default-src 'none'" in text
    assert not re.search(r'(src|href)="(?!#)', text), "something would be fetched"


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing", ["summary.json", "iter2/model", "iter1/data", "iter0", "matrix.json", "iter2", "logs"]
)
def test_a_run_that_broke_off_has_a_page(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / missing) if (run / missing).is_dir() else (run / missing).unlink()
    assert "<h2>" in write_page(run).read_text()


def test_what_is_damaged_or_deleted_is_left_out_and_said(tmp_path: Path) -> None:
    """The loop makes the page while a later stage's files may be damaged; it mends them, if the page lets it."""
    run = make_run(tmp_path / "run")
    (run / "iter2/data/train.parquet").unlink()  # its manifest is there
    (run / "iter1/data/train.parquet").write_bytes(b"PAR1")
    answered = run / "iter1/eval/responses.parquet"
    answered.write_bytes(answered.read_bytes()[:200])
    for name in ("summary.json", "matrix.json", "iter2/model/sppo_manifest.json", "iter1/data/train.manifest.json"):
        (run / name).write_text('{"iter')
    (run / "iter1/recipe.yaml").write_bytes(b"\xff: [")
    (run / "iter0/suites/mt_bench/figures.json").write_bytes(b"")
    said = warnings(gather(run))
    text = write_page(run).read_text()
    assert "<h2>Training</h2>" in text
    for name in ("summary.json", "matrix.json", "sppo_manifest.json", "train.manifest.json", "eval/responses.parquet",
                 "recipe.yaml", "figures.json"):  # fmt: skip
        assert sum(name in line for line in said if line.startswith("Left out")) == 1, name
        assert name in text
    assert all("\n" not in line for line in said)


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    dump(run / "iter1/recipe.yaml", {"model": "m"})
    work = run / "iter1/model.partial"
    work.mkdir()
    (work / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    found = gather(run)
    assert [s["step"] for s in found.iterations[0].steps] == [1]
    assert "No iteration has been compared" in write_page(run).read_text()
    with pytest.raises(SPPOError, match="is no run"):
        write_page(tmp_path)


def test_what_is_wrong_is_said_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", apart=0.1)
    manifest = run / "iter1/data/responses.manifest.json"
    content = json.loads(manifest.read_text())
    content["counts"]["cut_at_maxlen"] = 3
    dump(manifest, content)
    said = "\n".join(warnings(gather(run)))
    assert "Iteration 1: the engine's and the trainer's log-probs differ by 0.1 nats" in said
    assert "Iteration 1: 75% of the responses are cut at maxlen" in said
    assert said.count("\n") == 2  # and iteration 2's engine


@pytest.mark.slow
def test_runs_beside_each_other(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", 3)
    out = tmp_path / "c.html"
    command = [tiny.sys.executable, "scripts/report.py"]
    assert str(out) in tiny.succeed(*command, "--compare", one, two, "--output", out)
    text = out.read_text()
    assert "one, ranker" in text
    assert "two, ranker" in text
    assert "<td>iterations</td>" in text  # the setting in which they differ
    assert "<td>beta</td>" not in text
    assert write_comparison([one, two], out).read_text() == text
    assert "report.html" in tiny.succeed(*command, "--run_dir", one)
    for flags, message in ((["--run_dir", tmp_path], "is no run"), ([], "--run_dir is missing"),
                           (["--compare", one, "--run_dir", two], "leave --run_dir"),
                           (["--run_dir", one, "--iteration", "1"], "--eval_prompts is missing")):  # fmt: skip
        assert message in tiny.run(*command, *flags).stderr


@pytest.mark.slow
def test_a_real_browser_shows_it(tmp_path: Path) -> None:
    """No error in the console, every picture, searching, nothing beside the screen at three widths, no text is run."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromium-driver are not installed")
    page = write_page(make_run(tmp_path / "run"))
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        inks = set()
        for width, scheme in itertools.product((400, 1000, 1700), ("light", "dark")):
            theme = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", theme)
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(page.as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            label = "getComputedStyle(document.querySelector('figure svg text')).fill"
            inks.add((scheme, browser.execute_script(f"return {label}")))
        assert inks == {("light", "rgb(28, 32, 36)"), ("dark", "rgb(230, 232, 234)")}
        printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
        assert printed.startswith(b"%PDF")
        time.sleep(0.5)  # for an onerror that should not be
        assert browser.get_log("browser") == []
        assert browser.title == "SPPO: run"
        drawn = "return [...document.querySelectorAll('figure svg')].filter(s => s.getBoundingClientRect().height > 50)"
        assert browser.execute_script(f"{drawn}.length") == PICTURES
        shown = "return [...document.querySelectorAll('.prompt')].filter(p => p.offsetHeight > 0).length"
        assert browser.execute_script(shown) == len(EVIL)
        browser.find_element("id", "search").send_keys("question half")
        assert browser.execute_script(shown) == 1
        assert browser.find_element("id", "count").text == f"1 of {len(EVIL)} prompts"
        # what came through all the same would not run: only the page's own script does
        run_it = "const s = document.createElement('script'); s.text = 'document.title = 1'; document.body.append(s)"
        browser.execute_script(run_it)
        assert browser.title == "SPPO: run"
        assert "Content Security Policy" in str(browser.get_log("browser"))
        text = browser.execute_script("return document.querySelector('.asked').textContent")
        assert text == f"Question 0 about {EVIL[0]}"
    finally:
        browser.quit()

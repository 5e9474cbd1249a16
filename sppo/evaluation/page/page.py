"""The page: sections of pictures and tables from what a run wrote, in one HTML file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sppo.evaluation.guard import guard_table
from sppo.evaluation.guard import said as guard_said
from sppo.evaluation.health import BOUNDS
from sppo.evaluation.page import figures
from sppo.evaluation.page.gather import IterationRecord, RunRecord, gather
from sppo.evaluation.report import summary_table
from sppo.models.files import public_name
from sppo.schema import AGREEING, MANY_UNFINISHED
from sppo.store.files import atomic

# above these shares, those of health.BOUNDS and this ratio of perplexities a reader is warned
_MANY_CUT, _MANY_DROPPED, _FAR = 0.2, 0.1, 2.0

_Cell = Callable[[IterationRecord], Any]  # an iteration's number in a table; it may fail where that is not known yet


@dataclass
class Section:
    """A title, pictures, and a table, whose first row is its head."""

    title: str
    pictures: list[str]
    table: list[list[str]] = field(default_factory=list)

    @property
    def healthy(self) -> str:
        """What a healthy run looks like there."""
        return _HEALTHY.get(self.title, "")

    @property
    def anchor(self) -> str:
        """Its name in the page's address."""
        return self.title.lower().replace(" ", "-")


@dataclass
class Page:
    """What page.html shows. `run` and `facts` are of a page about one run."""

    title: str
    summary: list[str]
    warnings: list[str]
    sections: list[Section]
    versions: dict[str, str]
    facts: list[tuple[str, str]] = field(default_factory=list)
    run: RunRecord | None = None


def write_page(run_dir: Path) -> Path:
    """Write <run_dir>/report.html from whatever the run has written so far; returns where it is."""
    run = gather(run_dir)
    page = Page(run.name, _summary(run), warnings(run), _sections(run), run.versions, _facts(run), run)
    return _write(page, run_dir / "report.html")


def write_comparison(run_dirs: list[Path], path: Path) -> Path:
    """Write a page that puts runs side by side; returns where it is."""
    runs = [gather(run_dir) for run_dir in run_dirs]
    sections = [
        Section("Win rates", figures.win_rates(runs)),
        Section("Measures", figures.measures(runs)),
        Section("Training", figures.training(runs)),
        Section("Settings that differ", [], _differing_settings(runs)),
    ]
    page = Page(
        title=" and ".join(run.name for run in runs),
        summary=[f"{run.name}: {' '.join(_summary(run))}" for run in runs],
        warnings=[f"{run.name}: {line}" for run in runs for line in warnings(run)],
        sections=sections,
        versions=runs[0].versions,
    )
    return _write(page, path)


def _differing_settings(runs: list[RunRecord]) -> list[list[str]]:
    """A row for each setting that is not the same in all runs; nothing where all are."""
    rows = []
    for key in sorted({key for run in runs for key in run.settings}):
        if len({str(run.settings.get(key)) for run in runs}) > 1:
            rows.append([key, *(str(run.settings.get(key, "")) for run in runs)])
    return [["setting", *(run.name for run in runs)], *rows] if rows else []


def _write(page: Page, path: Path) -> Path:
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.sections = [section for section in page.sections if section.pictures or section.table]

    # The browser runs a script of this digest and no other. So a script in a model's text would not run, even if its
    # markup got through.
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template("page.html").render(page=page, script=script, digest=digest)
    with atomic(path) as temporary:
        # a model may write half a character; the page shows a question mark in its place
        temporary.write_text(text, encoding="utf-8", errors="replace")
    return path


_HEALTHY = {
    "Win rates": "Healthy: win rates rise in every iteration, and the second judge's, if there is one, rise with the "
    "ranker's. Bars are 95% intervals over prompts. Where a bar reaches below 50%, the model may not be better than "
    "the first one. The win matrix compares iterations with each other.",
    "Ranker and judge": "Healthy: by the ranker and by the second judge, each iteration beats the one before. If the "
    "judge's bar is wholly below 50%, the judge finds the answers worse than those before; what the ranker still likes "
    "in them may be a weakness of the ranker. Of the pairs of answers, same is the share in which both prefer the same "
    "answer, apart that in which they prefer different ones, and tied that in which at least one of them prefers none. "
    "distinct_2 is the number of different bigrams divided by that of all. overlap_2 says how alike the answers "
    "to one prompt are: if it rises a lot, the policy says the same each time. kl is an estimate of the KL divergence "
    "from the first model; it is there with --base_perplexity.",
    "Win matrix": "Healthy: win rates below the diagonal are above 50%, so each iteration beats those before it. Where "
    "a later iteration loses to an earlier one, look at the mixture of models in the table.",
    "Measures": "Healthy: lengths change little, and few answers are empty, repeat themselves or are cut. If the "
    "perplexity rises a lot, the ranker likes the answers, but the first model finds them very unlikely.",
    "Training": "Healthy: the loss falls within an iteration, and the margin starts at 0 and rises. A step's loss is "
    "the loss of its own pairs, so it jumps from step to step; look at many steps.",
    "Log-ratios": "Healthy: chosen and rejected move apart, towards their targets. With a small beta the targets are "
    "far away and are not reached. Often both fall together; if they fall far, that is a warning.",
    "Win rates of pairs": "Healthy: the responses of a pair differ. p is well above 0.5, and p_win is above p_lose. "
    "Many values at 0.5 mean that the ranker sees no difference; many at 0 and 1, that it is saturated.",
    "Lengths": "Healthy: chosen and rejected responses have similar lengths. If chosen ones are longer everywhere, the "
    "ranker rewards length.",
    "Benchmark suites": "Healthy: scores for knowledge and reasoning stay where the first model's are, and scores that "
    "a judge gives rise. If a score falls, the run has cost an ability that its ranker does not see. A published model "
    "began with the same model as this run; its figures are those of the suite's leaderboard.",
    "Data": "Healthy: few prompts are dropped and few responses are cut. If the position bias is far from 0, the "
    "ranker prefers the response that is shown first; if the correlation of score and length is, it rewards length. "
    f"Where the log-probs of engine and trainer differ by less than {AGREEING} nats a token, both compute the same "
    "policy; in float32 it is about 1e-6.",
    "Time and tokens": "Healthy: no stage takes much longer from one iteration to the next. If a stage was stopped, "
    "its time is that of the last try.",
}


def _sections(run: RunRecord) -> list[Section]:
    return [
        Section("Win rates", figures.win_rates([run]), summary_table(run.compared)),
        Section("Ranker and judge", figures.guard(run), guard_table(run.guard) if run.guard else []),
        Section("Win matrix", figures.matrix(run), _matrix_table(run)),
        Section("Measures", figures.measures([run])),
        Section("Training", figures.training([run])),
        Section("Log-ratios", figures.log_ratios(run)),
        Section("Win rates of pairs", figures.rates(run)),
        Section("Lengths", figures.lengths(run)),
        Section("Benchmark suites", [], _suite_table(run)),
        Section("Data", [], _data_table(run)),
        Section("Time and tokens", [], _time_table(run)),
    ]


def _matrix_table(run: RunRecord) -> list[list[str]]:
    """Each model's mean length, win rates at equal length, and share of the von Neumann winner."""
    if not run.matrix:
        return []
    models = run.matrix["models"]
    judges = {"": run.matrix}
    if run.matrix.get("judge"):
        judges[f" ({run.matrix['judge']['name']})"] = run.matrix["judge"]

    at_equal_length = []
    for judge, found in judges.items():
        for model, row in zip(models[1:], found["length_controlled"][1:], strict=True):
            cells = [f"{100 * rate:.1f}" for rate in row]
            at_equal_length.append([f"win rate of {model} at equal length, %{judge}", *cells])

    shares = [f"{100 * abs(share):.1f}" for share in run.matrix["von_neumann"]["mixture"]]
    return [
        ["", *models],
        ["mean tokens", *map(_number, run.matrix["mean_tokens"])],
        *at_equal_length,
        ["share of the mixture that no model and no mixture beats, %", *shares],
    ]


def _suite_table(run: RunRecord) -> list[list[str]]:
    """A row for each figure of a suite, a column for each model that was asked, then for each published one."""
    asked: dict[str, dict[tuple[str, str], float]] = {}  # by column: by (suite and judge, figure)
    published: dict[str, dict[tuple[str, str], float]] = {}
    for number, suites in run.suites.items():
        column = "first model" if number == 0 else f"iteration {number}"
        for suite in suites:
            name = f"{suite['suite']}, judged by {suite['judge']}" if suite.get("judge") else suite["suite"]
            asked.setdefault(column, {}).update({(name, key): value for key, value in suite["figures"].items()})
            for model, of in suite.get("published", {}).items():
                published.setdefault(f"published: {model}", {}).update({(name, key): of[key] for key in of})
    if not asked:
        return []
    columns = {**asked, **published}
    rows = dict.fromkeys(key for column in columns.values() for key in column)
    return [["suite", "figure", *columns], *([*key, *(_number(c.get(key)) for c in columns.values())] for key in rows)]


def _time_table(run: RunRecord) -> list[list[str]]:
    stages = dict.fromkeys(stage for i in run.iterations for stage in i.seconds)
    rows: list[tuple[str, _Cell]] = [(f"{stage}, seconds", partial(_seconds, stage)) for stage in stages]
    rows += [
        ("tokens drawn", lambda i: i.drawn["response_tokens"]),
        ("tokens drawn a second", lambda i: i.drawn["response_tokens"] / i.seconds["generate"]),
        ("training's tokens a second", lambda i: float(statistics.median(s["tokens_per_second"] for s in i.steps))),
    ]
    return _by_iteration(run, rows)


def _seconds(stage: str, iteration: IterationRecord) -> float | None:
    return iteration.seconds.get(stage)


def _data_table(run: RunRecord) -> list[list[str]]:
    rows: list[tuple[str, _Cell]] = [
        ("prompts answered", lambda i: i.drawn["written"]),
        ("prompts skipped", lambda i: sum(i.drawn["skipped"].values())),
        ("responses", lambda i: i.drawn["responses"]),
        ("answers of other models", lambda i: i.drawn["extra_responses"]),
        ("responses cut at maxlen, %", lambda i: 100 * i.drawn["cut_at_maxlen"] / max(i.drawn["responses"], 1)),
        ("responses without an answer: the thought did not end, %", _unfinished),
        ("thoughts ended by --thinking_budget", lambda i: i.drawn["thoughts_cut_at_budget"]),
        ("tokens of a response before its answer, mean", lambda i: i.drawn["thought_tokens"] / i.drawn["responses"]),
        ("pairs to train on", lambda i: i.paired["train"]),
        ("pairs dropped", lambda i: sum(i.paired["dropped"].values())),
        ("ties among comparisons, %", lambda i: 200 * i.paired["tied_pairs"] / max(i.paired["pairs"], 1)),
        ("pairs beyond 0.99 or below 0.01, %", lambda i: 100 * i.paired["certain_pairs"]),
        ("pairs within 0.01 of 1/2, %", lambda i: 100 * i.paired["even_pairs"]),
        ("share of triples that go in a circle", lambda i: i.paired["intransitive_triples"]),
        ("share of the log-odds that goes in circles", lambda i: i.paired["circular_share"]),
        ("position bias", lambda i: i.paired["position_bias"]),
        ("correlation of score and length", lambda i: i.paired["score_length_correlation"]),
        ("responses cut for training", lambda i: i.trained["counts"]["responses_cut"]),
        ("log-probs of engine and trainer apart, mean", lambda i: i.trained["agreement"]["mean_difference"]),
        ("the same, largest of a response", lambda i: i.trained["agreement"]["largest_difference"]),
    ]
    return _by_iteration(run, rows)


def _unfinished(iteration: IterationRecord) -> float:
    return 100 * iteration.drawn["unfinished_thoughts"] / max(iteration.drawn["responses"], 1)


def _by_iteration(run: RunRecord, rows: list[tuple[str, _Cell]]) -> list[list[str]]:
    """A table with a column for each iteration; nothing where no cell is known."""
    head = ["", *(f"iteration {i.number}" for i in run.iterations)]
    made = [[label, *(_try(value, i) for i in run.iterations)] for label, value in rows]
    made = [row for row in made if any(row[1:])]
    return [head, *made] if made else []


def _try(value: _Cell, iteration: IterationRecord) -> str:
    """A cell; empty where the iteration has not come so far."""
    try:
        return _number(value(iteration))
    except (TypeError, KeyError, ZeroDivisionError, statistics.StatisticsError):
        return ""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value + 0.0:.4g}"  # + 0.0: no -0


def _summary(run: RunRecord) -> list[str]:
    """What a reader should know first, in sentences."""
    done = [i.number for i in run.iterations if i.trained]
    wanted = run.settings.get("iterations", len(run.iterations))
    name = public_name(str(run.settings.get("model", "the first model")))
    said = [f"{name}: {len(done)} of {wanted} iterations are trained."]
    if run.compared:
        last = run.compared[-1]
        low, high = last["ranker_interval"]
        said.append(
            f"Iteration {last['iteration']} wins {100 * last['ranker_win_rate']:.1f}% of comparisons with the first "
            f"model (95% interval {100 * low:.1f} to {100 * high:.1f}%) on {last['prompts']} held-out prompts."
        )
        said.append(f"Answers have {last['mean_tokens']:.0f} tokens; the first model's {last['base_mean_tokens']:.0f}.")
    else:
        said.append("No iteration has been compared with the first model: that takes --eval_prompts.")
    return said


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """What has changed from the first model to the last one that was compared: (what, from → to)."""
    if not run.compared:
        return []
    names, first, *_, last = summary_table(run.compared)
    return [
        (name, f"{_short(before)} → {_short(after)}")
        for name, before, after in zip(names, first, last, strict=True)
        if before and name != "iteration"
    ]


def _short(cell: str) -> str:
    """A cell of the summary with three digits; a share stays as it is."""
    return cell if not cell or "%" in cell else f"{float(cell):.3g}"


def warnings(run: RunRecord) -> list[str]:
    """What a reader should look at, in sentences."""
    said = [f"Left out, because it cannot be read: {message}" for message in run.unread]
    said += guard_said(run.guard) if run.guard else []
    for i in run.iterations:
        row, where = i.compared, f"Iteration {i.number}"
        apart = (i.trained.get("agreement") or {}).get("mean_difference", 0)
        if apart > AGREEING:
            said.append(f"{where}: the engine's and the trainer's log-probs differ by {apart:.2g} nats a token.")
        if i.drawn and i.drawn["cut_at_maxlen"] > _MANY_CUT * i.drawn["responses"]:
            share = i.drawn["cut_at_maxlen"] / i.drawn["responses"]
            said.append(f"{where}: {share:.0%} of the responses are cut at maxlen; raise --maxlen.")
        if i.drawn and i.drawn.get("unfinished_thoughts", 0) > MANY_UNFINISHED * i.drawn["responses"]:
            share = i.drawn["unfinished_thoughts"] / i.drawn["responses"]
            said.append(
                f"{where}: {share:.0%} of the responses have no answer, because their thought did not end; raise "
                "--maxlen, or set --thinking_budget."
            )
        if row.get("unfinished_thoughts", 0) > MANY_UNFINISHED:
            said.append(f"{where}: {row['unfinished_thoughts']:.0%} of the held-out thoughts did not end.")
        if i.paired and sum(i.paired["dropped"].values()) > _MANY_DROPPED * max(i.paired["prompts"], 1):
            said.append(f"{where}: {sum(i.paired['dropped'].values())} of {i.paired['prompts']} prompts give no pair.")
        if row.get("repeated", 0) > BOUNDS["repeated"]:
            said.append(f"{where}: {row['repeated']:.0%} of the held-out answers repeat themselves.")
        if row.get("empty", 0) > BOUNDS["empty"]:
            said.append(f"{where}: {row['empty']:.0%} of the held-out answers are empty.")
        if "base_perplexity" in row and row["base_perplexity"] > _FAR * run.base.get("base_perplexity", float("inf")):
            said.append(f"{where}: the first model finds the answers far less likely than its own.")
    return said

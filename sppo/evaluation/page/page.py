"""The page: sections of pictures and tables from what a run wrote, in one HTML file that asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppo.evaluation.page import figures
from sppo.evaluation.page.gather import Iteration, Run, gather
from sppo.evaluation.report import table
from sppo.models.files import public_name
from sppo.schema import AGREEING
from sppo.store.files import atomic

_MANY_CUT, _MANY_DROPPED, _MANY_REPEATED, _FAR = 0.2, 0.1, 0.1, 2.0  # above these a reader is warned


@dataclass
class Section:
    """A title, pictures, what a healthy run looks like there, and a table of rows under its head."""

    title: str
    healthy: str
    pictures: list[str]
    table: list[list[str]] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Its name in the page's address."""
        return self.title.lower().replace(" ", "-")


def write_page(run_dir: Path) -> Path:
    """Write <run_dir>/report.html from whatever the run has written so far; returns where it is."""
    run = gather(run_dir)
    sections = [s for s in _sections(run) if s.pictures or s.table]
    return _write(run_dir / "report.html", run.name, [run], sections, _summary(run), warnings(run), run, _facts(run))


def write_comparison(run_dirs: list[Path], path: Path) -> Path:
    """Write a page that puts runs beside each other; returns where it is."""
    runs = [gather(run_dir) for run_dir in run_dirs]
    differing = sorted({k for run in runs for k in run.settings if len({str(r.settings.get(k)) for r in runs}) > 1})
    settings = [["setting", *(run.name for run in runs)]]
    settings += [[key, *(str(run.settings.get(key, "")) for run in runs)] for key in differing]
    sections = [
        Section("Win rates", _HEALTHY["Win rates"], figures.win_rates(runs)),
        Section("Measures", _HEALTHY["Measures"], figures.measures(runs)),
        Section("Training", _HEALTHY["Training"], figures.training(runs)),
        Section("Settings that differ", "", [], settings if differing else []),
    ]
    summary = [f"{run.name}: {' '.join(_summary(run))}" for run in runs]
    warned = [f"{run.name}: {line}" for run in runs for line in warnings(run)]
    title = " and ".join(run.name for run in runs)
    return _write(path, title, runs, [s for s in sections if s.pictures or s.table], summary, warned, None)


def _write(path: Path, title: str, runs: list[Run], sections: list[Section], summary: list[str],
           warned: list[str], run: Run | None, facts: list[tuple[str, str]] | None = None) -> Path:  # fmt: skip
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    settings = sorted((str(k), str(v)) for k, v in (run.settings if run else {}).items())
    numbers = sorted({n for p in (run.prompts if run else []) for n in p.answers})
    # the browser runs the one script that is this one, so that markup which came through would still be dead
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("page.html").render(
        script=script, digest=digest, facts=facts,
        title=title, sections=sections, summary=summary, warnings=warned, run=run, settings=settings, numbers=numbers,
        versions=runs[0].versions,
    )  # fmt: skip
    with atomic(path) as temporary:
        # a model may write half a character; a page shows a mark in its place
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return path


_HEALTHY = {
    "Win rates": "A healthy run rises in every iteration, and the second judge, where there is one, rises with the "
    "ranker. Bars are 95% intervals over prompts: one that reaches below 50% leaves open whether the model got better. "
    "Whether one iteration beats another is in the win matrix.",
    "Win matrix": "A healthy run wins below the diagonal: each iteration beats those before it. A circle, where a "
    "later one loses to an earlier one, asks for a mixture of models.",
    "Measures": "Healthy lengths move little, and few answers are empty, repeat themselves or are cut. A perplexity "
    "that rises far means that answers please the ranker but are no language of the first model's any more.",
    "Training": "A step's loss is that of its own pairs, so it jumps; over many steps a healthy one falls within an "
    "iteration. The margin starts at 0 in each iteration and rises.",
    "Log-ratios": "Healthy log-ratios move apart, towards their targets. With a small beta the targets are far away, "
    "and are not reached; both sides falling together is common, and far is a warning.",
    "Win rates of pairs": "Healthy pairs differ: p is well above a half, p_win above p_lose. A heap at a half means "
    "that the ranker sees no difference; a heap at 0 and 1, that it is saturated.",
    "Lengths": "Chosen and rejected answers are alike in length. Where chosen ones are longer throughout, the ranker "
    "rewards length.",
    "Benchmark suites": "Healthy figures of knowledge and reasoning stay where the first model's are; those that a "
    "judge gives rise. A fall means that the run has cost abilities that its ranker does not see.",
    "Data": "Few prompts are dropped and few answers cut. A position bias far from 0 means that the ranker prefers "
    "what is shown first; a correlation of score and length far from 0, that it rewards length.",
    "Agreement of engine and trainer": f"The engine that draws and the trainer mean the same policy: the mean is below "
    f"the line at {AGREEING} nats a token. In float32 it is about 1e-6.",
    "Time and tokens": "No stage takes much longer from one iteration to the next. Of a stopped stage it is "
    "the last try.",
}


def _sections(run: Run) -> list[Section]:
    pictures = {
        "Win rates": figures.win_rates([run]),
        "Win matrix": figures.matrix(run),
        "Measures": figures.measures([run]),
        "Training": figures.training([run]),
        "Log-ratios": figures.log_ratios(run),
        "Win rates of pairs": figures.rates(run),
        "Lengths": figures.lengths(run),
        "Benchmark suites": [],
        "Data": [],
        "Agreement of engine and trainer": figures.agreement(run, AGREEING),
        "Time and tokens": figures.seconds(run),
    }
    tables = {
        "Win rates": _summary_table(run), "Win matrix": _mixture(run), "Benchmark suites": _suites(run),
        "Data": _data_table(run), "Time and tokens": _time_table(run),
    }  # fmt: skip
    return [Section(title, _HEALTHY[title], drawn, tables.get(title, [])) for title, drawn in pictures.items()]


def _summary_table(run: Run) -> list[list[str]]:
    rows = [i.compared for i in run.iterations if i.compared]
    return table(rows) if rows else []


def _mixture(run: Run) -> list[list[str]]:
    if not run.matrix:
        return []
    found = run.matrix
    judge = found.get("judge")
    by = {"": found} | ({f" ({judge['name']})": judge} if judge else {})
    equal = [
        [f"{model} wins at equal length, %{name}", *(f"{100 * x:.1f}" for x in row)]
        for name, of in by.items()
        for model, row in list(zip(found["models"], of["length_controlled"], strict=True))[1:]
    ]
    return [
        ["", *found["models"]],
        ["mean tokens", *map(_number, found["mean_tokens"])],
        *equal,
        ["share of the mixture that none beats, %", *(f"{100 * abs(q):.1f}" for q in found["von_neumann"]["mixture"])],
    ]


def _suites(run: Run) -> list[list[str]]:
    """A row for each figure of a suite, a column for each model that was asked."""
    found = {
        number: {(s["suite"], s.get("judge") or "", name): x for s in suites for name, x in s["figures"].items()}
        for number, suites in run.suites.items()
        if suites
    }
    rows = dict.fromkeys(key for figures_ in found.values() for key in figures_)
    head = ["suite", "figure", *("first model" if number == 0 else f"iteration {number}" for number in found)]
    named = [(suite + (f", judged by {judge}" if judge else ""), name) for suite, judge, name in rows]
    cells = [[_number(of.get(key)) for of in found.values()] for key in rows]
    return [head, *([*names, *row] for names, row in zip(named, cells, strict=True))] if rows else []


def _time_table(run: Run) -> list[list[str]]:
    stages = dict.fromkeys(stage for i in run.iterations for stage in i.seconds)
    rows = [(f"{stage}, seconds", lambda i, stage=stage: i.seconds.get(stage)) for stage in stages]
    rows += [
        ("tokens drawn", lambda i: i.drawn["response_tokens"]),
        ("tokens drawn a second", lambda i: i.drawn["response_tokens"] / i.seconds["generate"]),
        ("training's tokens a second", lambda i: float(statistics.median(s["tokens_per_second"] for s in i.steps))),
    ]
    return _by_iteration(run, rows)


def _data_table(run: Run) -> list[list[str]]:
    rows = [
        ("prompts answered", lambda i: i.drawn["written"]),
        ("prompts skipped", lambda i: sum(i.drawn["skipped"].values())),
        ("responses", lambda i: i.drawn["responses"]),
        ("responses cut at maxlen, %", lambda i: 100 * i.drawn["cut_at_maxlen"] / max(i.drawn["responses"], 1)),
        ("pairs to train on", lambda i: i.paired["train"]),
        ("pairs dropped", lambda i: sum(i.paired["dropped"].values())),
        ("ties among comparisons, %", lambda i: 100 * i.paired["tied_pairs"] / max(i.paired["pairs"], 1)),
        ("triples that go round, a share", lambda i: i.paired["intransitive_triples"]),
        ("position bias", lambda i: i.paired["position_bias"]),
        ("correlation of score and length", lambda i: i.paired["score_length_correlation"]),
        ("responses cut for training", lambda i: i.trained["counts"]["responses_cut"]),
    ]
    return _by_iteration(run, rows)


def _by_iteration(run: Run, rows: list[tuple[str, Callable[[Iteration], Any]]]) -> list[list[str]]:
    """A table with a column for each iteration; nothing where no cell is known."""
    head = ["", *(f"iteration {i.number}" for i in run.iterations)]
    made = [[label, *(_try(value, i) for i in run.iterations)] for label, value in rows]
    made = [row for row in made if any(row[1:])]
    return [head, *made] if made else []


def _try(value: Any, iteration: Iteration) -> str:
    """A cell; empty where the iteration has not come so far."""
    try:
        return _number(value(iteration))
    except (TypeError, KeyError, ZeroDivisionError, statistics.StatisticsError):
        return ""


def _number(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value + 0.0:.4g}"


def _summary(run: Run) -> list[str]:
    """What a reader should know first, in sentences."""
    done = [i.number for i in run.iterations if i.trained]
    wanted = run.settings.get("iterations", len(run.iterations))
    name = public_name(str(run.settings.get("model", "the first model")))
    said = [f"{name}: {len(done)} of {wanted} iterations are trained."]
    rows = [i.compared for i in run.iterations if i.compared]
    if rows:
        last = rows[-1]
        low, high = last.get("ranker_interval", (None, None))
        between = f" (95% interval {100 * low:.1f} to {100 * high:.1f}%)" if low is not None else ""
        said.append(
            f"Iteration {last['iteration']} wins {100 * last['ranker_win_rate']:.1f}% of comparisons with the first "
            f"model{between} on {last['prompts']} held-out prompts."
        )
        said.append(f"Answers have {last['mean_tokens']:.0f} tokens; the first model's {last['base_mean_tokens']:.0f}.")
    else:
        said.append("No iteration has been compared with the first model; --eval_prompts does that.")
    return said


def _facts(run: Run) -> list[tuple[str, str]]:
    """What has changed from the first model to the last one that was compared: (what, from → to)."""
    rows = [i.compared for i in run.iterations if i.compared]
    if not rows or len(cells := table(rows)) < 3:
        return []
    first, last = ([c if not c or "%" in c else f"{float(c):.3g}" for c in cells[n]] for n in (1, -1))
    return [
        (name, f"{before} → {after}")
        for name, before, after in zip(cells[0], first, last, strict=True)
        if before and name != "iteration"
    ]


def warnings(run: Run) -> list[str]:
    """What a reader should look at, in sentences."""
    said = [f"Left out, since it cannot be read: {message}" for message in run.unread]
    for i in run.iterations:
        row, where = i.compared or {}, f"Iteration {i.number}"
        apart = ((i.trained or {}).get("agreement") or {}).get("mean_difference", 0)
        if apart > AGREEING:
            said.append(f"{where}: engine and trainer differ by {apart:.2g} nats a token about the policy.")
        if i.drawn and i.drawn["cut_at_maxlen"] > _MANY_CUT * i.drawn["responses"]:
            share = i.drawn["cut_at_maxlen"] / i.drawn["responses"]
            said.append(f"{where}: {share:.0%} of the responses are cut at maxlen; raise --maxlen.")
        if i.paired and sum(i.paired["dropped"].values()) > _MANY_DROPPED * max(i.paired["prompts"], 1):
            said.append(f"{where}: {sum(i.paired['dropped'].values())} of {i.paired['prompts']} prompts give no pair.")
        if row.get("repeated", 0) > _MANY_REPEATED:
            said.append(f"{where}: {row['repeated']:.0%} of the held-out answers repeat themselves.")
        if row.get("empty", 0) > 0.02:
            said.append(f"{where}: {row['empty']:.0%} of the held-out answers are empty.")
        if "base_perplexity" in row and row["base_perplexity"] > _FAR * run.base.get("base_perplexity", float("inf")):
            said.append(f"{where}: the first model finds the answers far less likely than its own.")
    return said

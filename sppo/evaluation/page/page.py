"""The page: sections of pictures and tables from what a run wrote, in one HTML file that asks for nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppo.common.files import atomic
from sppo.common.health import AGREEING
from sppo.common.model_files import public_name
from sppo.evaluation.page import figures
from sppo.evaluation.page.gather import Iteration, Run, gather
from sppo.evaluation.report import table

_MANY_CUT, _MANY_DROPPED, _MANY_REPEATED, _FAR = 0.2, 0.1, 0.1, 2.0  # above these a reader is warned


@dataclass
class Section:
    """A title, a picture, what a healthy run looks like there, and a table of rows under its head."""

    title: str
    healthy: str
    picture: str | None = None
    table: list[list[str]] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Its name in the page's address."""
        return self.title.lower().replace(" ", "-")


def write_page(run_dir: Path) -> Path:
    """Write <run_dir>/report.html from whatever the run has written so far; returns where it is."""
    run = gather(run_dir)
    sections = [s for s in _sections(run) if s.picture or s.table]
    return _write(run_dir / "report.html", run.name, [run], sections, _summary(run), warnings(run), run)


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
        Section("Settings that differ", "", None, settings if differing else []),
    ]
    summary = [line for run in runs for line in [f"{run.name}: {' '.join(_summary(run))}"]]
    warned = [f"{run.name}: {line}" for run in runs for line in warnings(run)]
    title = " and ".join(run.name for run in runs)
    return _write(path, title, runs, [s for s in sections if s.picture or s.table], summary, warned, None)


def _write(path: Path, title: str, runs: list[Run], sections: list[Section], summary: list[str],
           warned: list[str], run: Run | None) -> Path:  # fmt: skip
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    settings = sorted((str(k), str(v)) for k, v in (run.settings if run else {}).items())
    numbers = sorted({n for p in (run.prompts if run else []) for n in p.answers})
    page = environment.get_template("page.html").render(
        title=title, sections=sections, summary=summary, warnings=warned, run=run, settings=settings, numbers=numbers,
        versions=runs[0].versions,
    )  # fmt: skip
    with atomic(path) as temporary:
        # a model may write half a character; a page shows a mark in its place
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return path


_HEALTHY = {
    "Win rates": "A healthy run rises in every iteration, and the second judge, where there is one, rises with the "
    "ranker. Bars are 95% intervals over prompts: where they overlap, more prompts are needed to tell.",
    "Win matrix": "A healthy run wins below the diagonal: each iteration beats those before it. A circle, where a "
    "later one loses to an earlier one, asks for a mixture of models.",
    "Measures": "Healthy lengths move little, and few answers are empty, repeat themselves or are cut. A perplexity "
    "that rises far means that answers please the ranker but are no language of the first model's any more.",
    "Training": "A healthy loss falls within an iteration from its value at step 1, and the margin rises from 0.",
    "Log-ratios": "Healthy log-ratios move apart, towards their targets. With a small beta the targets are far away, "
    "and are not reached; both sides falling together is common, and far is a warning.",
    "Win rates of pairs": "Healthy pairs differ: p is well above a half, p_win above p_lose. A heap at a half means "
    "that the ranker sees no difference; a heap at 0 and 1, that it is saturated.",
    "Lengths": "Chosen and rejected answers are alike in length. Where chosen ones are longer throughout, the ranker "
    "rewards length.",
    "Data": "Few prompts are dropped and few answers cut. A position bias far from 0 means that the ranker prefers "
    "what is shown first; a correlation of score and length far from 0, that it rewards length.",
    "Agreement of engine and trainer": f"The engine that draws and the trainer mean the same policy: the mean is below "
    f"the line at {AGREEING} nats a token. In float32 it is about 1e-6.",
    "Time": "No stage takes much longer from one iteration to the next.",
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
        "Data": None,
        "Agreement of engine and trainer": figures.agreement(run, AGREEING),
        "Time": figures.seconds(run),
    }
    tables = {"Win rates": _summary_table(run), "Win matrix": _mixture(run), "Data": _data_table(run)}
    return [Section(title, _HEALTHY[title], svg, tables.get(title, [])) for title, svg in pictures.items()]


def _summary_table(run: Run) -> list[list[str]]:
    rows = [i.compared for i in run.iterations if i.compared]
    return table(rows) if rows else []


def _mixture(run: Run) -> list[list[str]]:
    if not run.matrix:
        return []
    found = run.matrix
    last = [f"{100 * x:.1f}" for x in found["length_controlled"][-1]]
    return [
        ["", *found["models"]],
        ["mean tokens", *map(_number, found["mean_tokens"])],
        ["the last model wins at equal length, %", *last],
        ["share of the mixture that none beats, %", *(f"{100 * abs(q):.1f}" for q in found["von_neumann"]["mixture"])],
    ]


def _data_table(run: Run) -> list[list[str]]:
    head = ["", *(f"iteration {i.number}" for i in run.iterations)]
    rows = [
        ("prompts answered", lambda i: i.drawn["written"]),
        ("prompts skipped", lambda i: sum(i.drawn["skipped"].values())),
        ("responses", lambda i: i.drawn["responses"]),
        ("response tokens", lambda i: i.drawn["response_tokens"]),
        ("responses cut at maxlen, %", lambda i: 100 * i.drawn["cut_at_maxlen"] / max(i.drawn["responses"], 1)),
        ("pairs to train on", lambda i: i.paired["train"]),
        ("pairs dropped", lambda i: sum(i.paired["dropped"].values())),
        ("ties among comparisons, %", lambda i: 100 * i.paired["tied_pairs"] / max(i.paired["pairs"], 1)),
        ("triples that go round, a share", lambda i: i.paired["intransitive_triples"]),
        ("position bias", lambda i: i.paired["position_bias"]),
        ("correlation of score and length", lambda i: i.paired["score_length_correlation"]),
        ("responses cut for training", lambda i: i.trained["counts"]["responses_cut"]),
    ]
    made = [[label, *(_try(value, i) for i in run.iterations)] for label, value in rows]
    return [head, *made] if any(cell for row in made for cell in row[1:]) else []


def _try(value: Any, iteration: Iteration) -> str:
    """A cell; empty where the iteration has not come so far."""
    try:
        return _number(value(iteration))
    except (TypeError, KeyError):
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


def warnings(run: Run) -> list[str]:
    """What a reader should look at, in sentences."""
    said = [*run.unreadable]
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

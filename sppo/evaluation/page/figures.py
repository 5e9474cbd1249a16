"""The page's pictures, as SVG inside HTML: drawn by matplotlib, without scripts, for dark and light pages.

Text and axes are drawn in the page's own colour (currentColor), so they follow its theme. All plots have the same
width: the page puts as many side by side as fit, and their text stays readable on a phone. Where a run has written
nothing to draw, a function returns no pictures.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from sppo.evaluation.page.gather import IterationRecord, RunRecord
from sppo.method.preference import Array

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

_WIDTH = 48  # letters of a plot's width: a judge's name may be longer
_LENGTHS = ("mean_tokens", "mean_thought_tokens")
_INK = "#123457"  # replaced by currentColor
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, for all kinds of sight
_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "sppo", "font.family": "sans-serif", "font.size": 11, "text.color": _INK,
    "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "grid.color": _INK,
    "grid.alpha": 0.15, "axes.grid": True, "axes.facecolor": "none", "figure.facecolor": "none",
    "axes.prop_cycle": cycler(color=COLOURS), "text.parse_math": False,
}  # fmt: skip


def _picture(title: str, draw: Callable[[Axes], None], height: float = 2.9) -> str:
    """SVG of one plot, which `draw` fills; height in inches, of 4.6 inches' width."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        axis = figure.subplots()
        draw(axis)
        axis.set_title(textwrap.fill(title, _WIDTH), loc="left")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{html.escape(title)}"', svg, count=1)


def _iterations(axis: Axes, numbers: Sequence[int], label: str) -> None:
    axis.set_xticks(sorted(set(numbers)))
    axis.set_xlabel("iteration (0: the first model)" if 0 in numbers else "iteration")
    axis.set_ylabel(label)


def _name(run: RunRecord, runs: list[RunRecord], name: str) -> str:
    """A line's name: of several runs, with the run's."""
    return name if len(runs) == 1 else f"{run.name}, {name}"


def win_rates(runs: list[RunRecord]) -> list[str]:
    """Win rates over iterations with their intervals, of each judge and run."""
    lines = []
    for run in runs:
        for key in [k for k in (run.compared[0] if run.compared else {}) if k.endswith("_win_rate")]:
            name = key.removesuffix("_win_rate")
            points = [(r["iteration"], r[key], r[f"{name}_interval"]) for r in run.compared if key in r]
            lines.append((_name(run, runs, name), points))

    def draw(axis: Axes) -> None:
        for number, (label, points) in enumerate(lines):
            x = np.array([p[0] for p in points]) + 0.04 * number  # beside each other, so that intervals can be read
            y = 100 * np.array([p[1] for p in points])
            error = np.abs(100 * np.array([p[2] for p in points]).T - y)
            axis.errorbar(x, y, error, marker="o", capsize=3, label=textwrap.fill(label, _WIDTH))
        axis.axhline(50, color=_INK, linestyle=":", linewidth=1)
        _iterations(axis, [p[0] for _, points in lines for p in points], "wins, %")
        axis.legend(fontsize=9)

    return [_picture("Wins against the first model", draw)] if lines else []


def guard(run: RunRecord) -> list[str]:
    """Ranker against judge over iterations: against the iteration before, how far they agree, variety, divergence."""
    if not run.guard:
        return []
    curve = run.guard["curve"]
    steps = [(row["iteration"], row["against_before"]) for row in curve]
    answers = [(0, curve[0]["first_answers"]), *((row["iteration"], row["answers"]) for row in curve)]
    shares = {k: [(i, 100 * step["agreement"][k]) for i, step in steps] for k in ("same", "apart", "tied")}
    variety = {k: [(i, of[k]) for i, of in answers if of[k] is not None] for k in ("distinct_2", "overlap_2")}
    divergence = {"kl": [(row["iteration"], row["kl"]) for row in curve if "kl" in row]}
    judges = {"ranker": "ranker", "judge": textwrap.fill(curve[-1]["judge"], _WIDTH)}
    return [
        _picture("Wins against the iteration before", partial(_steps_won, steps=steps, labels=judges)),
        *_lines("Which answer ranker and judge prefer", shares, "pairs of answers, %"),
        *_lines("Variety of the answers", variety, "share of bigrams"),
        *_lines("KL divergence from the first model", divergence, "nats an answer"),
    ]


def _steps_won(axis: Axes, steps: list[tuple[int, dict[str, Any]]], labels: dict[str, str]) -> None:
    numbers = [number for number, _ in steps]
    for place, (who, label) in enumerate(labels.items()):
        y = 100 * np.array([of[who]["win_rate"] for _, of in steps])
        error = np.abs(100 * np.array([of[who]["interval"] for _, of in steps]).T - y)
        axis.errorbar(np.array(numbers) + 0.04 * place, y, error, marker="o", capsize=3, label=label)
    axis.axhline(50, color=_INK, linestyle=":", linewidth=1)
    _iterations(axis, numbers, "wins, %")
    axis.legend(fontsize=9)


def _lines(title: str, lines: dict[str, list[tuple[int, float]]], label: str) -> list[str]:
    """A picture of some values over iterations, a line each; none where no value is known."""
    lines = {name: points for name, points in lines.items() if points}

    def draw(axis: Axes) -> None:
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        _iterations(axis, [x for points in lines.values() for x, _ in points], label)
        axis.margins(y=0.2)  # before it is made to start at 0, so that nothing touches its end
        if all(y >= 0 for points in lines.values() for _, y in points):  # an estimate of a divergence may be below
            axis.set_ylim(bottom=0)
        axis.legend(fontsize=9)

    return [_picture(title, draw)] if lines else []


def matrix(run: RunRecord) -> list[str]:
    """The win matrix, row against column; the second judge's beside the ranker's."""
    if not run.matrix:
        return []
    models, judge = run.matrix["models"], run.matrix.get("judge")
    found = {"By the ranker": run.matrix}
    if judge:
        found[f"By {judge['name']}"] = judge
    return [_picture(title, partial(_cells, found=of, models=models), 3.6) for title, of in found.items()]


def _cells(axis: Axes, found: dict[str, Any], models: list[str]) -> None:
    rates, low, high = (100 * np.array(found[key]) for key in ("win_rates", "low", "high"))
    edges = np.arange(len(rates) + 1) - 0.5
    axis.pcolormesh(edges, edges, rates, cmap="RdBu", vmin=0, vmax=100, alpha=0.75)
    axis.invert_yaxis()
    axis.set_aspect("equal")
    axis.grid(False)
    size = min(9.0, 36 / len(rates))
    for i in range(len(rates)):
        for j in range(len(rates)):
            text = "" if i == j else f"{rates[i, j]:.1f}\n{low[i, j]:.0f} to {high[i, j]:.0f}"
            strong = abs(rates[i, j] - 50) > 35
            axis.text(j, i, text, ha="center", va="center", color="#ffffff" if strong else "#111111", fontsize=size)
    places = range(len(rates))
    axis.set_xticks(places, models)
    axis.set_yticks(places, models)
    axis.set_ylabel("these answers win …")
    axis.set_xlabel("… against these, %, with 95% intervals")


def measures(runs: list[RunRecord]) -> list[str]:
    """What answers are like, over iterations: each measure in a plot of its own kind."""
    shares = ("empty", "repeated", "cut", "unfinished_thoughts")
    seen = list(dict.fromkeys(name for run in runs for name in run.base))
    own = tuple(name for name in seen if name not in (*shares, *_LENGTHS, "base_perplexity"))
    plots = [  # (title, measures, label of the axis, scale)
        ("Length", _LENGTHS, "tokens per answer", 1.0),
        ("Health", shares, "answers, %", 100.0),
        ("Your measures (--measure)", own, "mean", 1.0),
        ("Perplexity under the first model", ("base_perplexity",), "perplexity", 1.0),
    ]
    return [
        _picture(title, partial(_measured, runs=runs, names=names, label=label, scale=scale))
        for title, names, label, scale in plots
        if set(names) & set(seen)
    ]


def _measured(axis: Axes, runs: list[RunRecord], names: Sequence[str], label: str, scale: float) -> None:
    for run in runs:
        for name in names:
            points = [(0, run.base.get(name)), *((i.number, i.compared.get(name)) for i in run.iterations)]
            known = [(x, scale * y) for x, y in points if y is not None]
            if known:
                axis.plot(*zip(*known, strict=True), marker="o", label=_name(run, runs, name))
    _iterations(axis, [0, *(i.number for run in runs for i in run.iterations)], label)
    axis.margins(y=0.2)  # before it is made to start at 0, so that nothing touches its end
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=9)


def training(runs: list[RunRecord]) -> list[str]:
    """Loss and the rewards' margin over the steps of all iterations, one behind the other."""
    if not any(i.steps for run in runs for i in run.iterations):
        return []
    plots = [  # (title, metric, label of the axis)
        ("Loss", "loss", "loss"),
        ("Loss without β", "beta2_loss", "loss × beta²"),
        ("Margin, chosen over rejected", "rewards/margins", "reward (beta × log-ratio)"),
    ]
    return [_picture(title, partial(_steps, runs=runs, key=key, label=label)) for title, key, label in plots]


def _steps(axis: Axes, runs: list[RunRecord], key: str, label: str) -> None:
    for number, run in enumerate(runs):
        start = 0  # the steps of the iterations before
        for iteration in run.iterations:
            points = [(start + s["step"], s[key]) for s in iteration.steps if key in s]
            if points:
                name = run.name if len(runs) > 1 and not start else None
                marker = "o" if len(points) == 1 else None  # one point is no line
                axis.plot(*zip(*points, strict=True), color=COLOURS[number % len(COLOURS)], label=name, marker=marker)
                start = points[-1][0]
                axis.axvline(start, color=_INK, linewidth=0.5, alpha=0.4)
    axis.set_xlabel("step (a line ends an iteration)")
    axis.set_ylabel(label)
    if len(runs) > 1:
        axis.legend(fontsize=9)


def log_ratios(run: RunRecord) -> list[str]:
    """log pi/pi_t of chosen and rejected responses against what the loss asks for, over all steps."""
    beta = float(run.settings.get("beta") or 0)
    sides = ("chosen", "rejected")
    steps: list[tuple[int, dict[str, Any]]] = []
    for iteration in run.iterations:
        start = steps[-1][0] if steps else 0
        steps += [(start + s["step"], s) for s in iteration.steps if f"rewards/{sides[0]}_target" in s]
    if not beta or not steps:
        return []

    def draw(axis: Axes) -> None:
        x = [number for number, _ in steps]
        for side, colour in zip(sides, COLOURS, strict=False):
            axis.plot(x, [s[f"rewards/{side}"] / beta for _, s in steps], color=colour, label=side)
            target = [s[f"rewards/{side}_target"] / beta for _, s in steps]
            axis.plot(x, target, color=colour, linestyle=":", label=f"{side}, target")
        axis.set_xlabel("step, of all iterations")
        axis.set_ylabel("log-ratio, nats")
        axis.legend(fontsize=9, ncols=2)
        axis.margins(y=0.25)  # room for the legend

    return [_picture("Against the targets", draw)]


def _histograms(run: RunRecord, values: Callable[[IterationRecord], dict[str, Array]], labels: tuple[str, str],
                bins: Array) -> list[str]:  # fmt: skip
    """A picture for each iteration: a histogram of each of its `values`, in % of their number."""

    def draw(axis: Axes, of: dict[str, Array]) -> None:
        for name, found in of.items():
            weights = np.full(len(found), 100 / len(found))
            axis.hist(found, bins.tolist(), weights=weights, label=name, histtype="step", lw=1.5)
        axis.set_xlabel(labels[0])
        axis.set_ylabel(labels[1])
        axis.legend(fontsize=9)

    pictures = []
    for iteration in run.iterations:
        known = {name: found for name, found in values(iteration).items() if len(found)}
        if known:
            pictures.append(_picture(f"Iteration {iteration.number}", partial(draw, of=known)))
    return pictures


def rates(run: RunRecord) -> list[str]:
    """Histograms of p, p_win and p_lose."""
    return _histograms(run, lambda i: i.rates, ("win rate", "pairs, %"), np.linspace(0, 1, 21))


def lengths(run: RunRecord) -> list[str]:
    """Histograms of the lengths of the responses: drawn, of other models, chosen and rejected."""
    longest = max((v.max() for i in run.iterations for v in i.lengths.values() if len(v)), default=1.0)
    return _histograms(run, lambda i: i.lengths, ("tokens", "responses, %"), np.linspace(0, longest, 21))

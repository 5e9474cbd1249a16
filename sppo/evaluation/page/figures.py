"""The page's pictures, as SVG inside HTML: drawn by matplotlib, without scripts, for dark and light pages.

Text and axes are drawn in one colour that stands for the page's own (currentColor), so they follow its theme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from sppo.evaluation.page.gather import Iteration, Run

_INK = "#123457"  # replaced by currentColor
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, for all kinds of sight
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "sppo", "font.family": "sans-serif", "font.size": 10, "text.color": _INK,
    "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.titlesize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "grid.color": _INK,
    "grid.alpha": 0.15, "axes.grid": True, "axes.facecolor": "none", "figure.facecolor": "none",
    "axes.prop_cycle": mpl.cycler(color=COLOURS), "text.parse_math": False,
}  # fmt: skip


def picture(draw: Callable[[list[Axes]], None], axes: int = 1, height: float = 3.0) -> str:
    """SVG of `axes` plots beside each other, which `draw` fills."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.0 * axes if axes > 1 else 6.4, height), layout="constrained")
        draw(list(np.atleast_1d(figure.subplots(1, axes))))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # narrower than that nobody can read it: the page lets it be scrolled
    least = f"min-width: {22 if axes == 1 else 15 * axes}rem"
    attributes = f'role="img" preserveAspectRatio="xMinYMid meet" style="{least}"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', attributes, svg, count=1)


def _iterations(axis: Axes, numbers: Sequence[int], label: str) -> None:
    axis.set_xticks(sorted(set(numbers)))
    axis.set_xlabel("iteration (0: the first model)" if 0 in numbers else "iteration")
    axis.set_ylabel(label)


def win_rates(runs: list[Run]) -> str | None:
    """Win rates over iterations with their intervals, of each judge and run."""
    lines = []
    for run in runs:
        rows = [i.compared for i in run.iterations if i.compared]
        for key in [k for k in (rows[0] if rows else {}) if k.endswith("_win_rate")]:
            name = key.removesuffix("_win_rate")
            label = name if len(runs) == 1 else f"{run.name}, {name}"
            lines.append((label, [(r["iteration"], r[key], r.get(f"{name}_interval")) for r in rows if key in r]))
    if not lines:
        return None

    def draw(axes: list[Axes]) -> None:
        (axis,) = axes
        for number, (label, points) in enumerate(lines):
            x = np.array([p[0] for p in points]) + 0.04 * number  # beside each other, so that intervals can be read
            y = 100 * np.array([p[1] for p in points])
            ends = [p[2] or (p[1], p[1]) for p in points]
            error = np.abs(100 * np.array(ends).T - y)
            axis.errorbar(x, y, error, marker="o", capsize=3, label=label)
        axis.axhline(50, color=_INK, linestyle=":", linewidth=1)
        _iterations(axis, [p[0] for _, points in lines for p in points], "wins against the first model, %")
        axis.legend()

    return picture(draw)


def matrix(run: Run) -> str | None:
    """The win matrix, row against column."""
    found = run.matrix
    if not found:
        return None
    rates, low, high = (100 * np.array(found[key]) for key in ("win_rates", "low", "high"))

    def draw(axes: list[Axes]) -> None:
        (axis,) = axes
        edges = np.arange(len(rates) + 1) - 0.5
        axis.pcolormesh(edges, edges, rates, cmap="RdBu", vmin=0, vmax=100, alpha=0.75)
        axis.invert_yaxis()
        axis.set_aspect("equal")
        axis.grid(False)
        for i in range(len(rates)):
            for j in range(len(rates)):
                text = "" if i == j else f"{rates[i, j]:.1f}\n{low[i, j]:.0f} to {high[i, j]:.0f}"
                strong = abs(rates[i, j] - 50) > 35
                axis.text(j, i, text, ha="center", va="center", color="#ffffff" if strong else "#111111", fontsize=9)
        places = range(len(rates))
        axis.set_xticks(places, found["models"])
        axis.set_yticks(places, found["models"])
        axis.set_ylabel("these answers win …")
        axis.set_xlabel("… against these, %, with 95% intervals")

    return picture(draw, height=1.2 + 0.8 * len(rates))


def measures(runs: list[Run]) -> str | None:
    """What answers are like, over iterations: each measure in a plot of its own kind."""
    shares = ("empty", "repeated", "cut")
    seen = {name for run in runs for name in run.base}
    own = [
        n
        for n in dict.fromkeys(n for run in runs for n in run.base)
        if n not in (*shares, "mean_tokens", "base_perplexity")
    ]
    groups = [(["mean_tokens"], "tokens", 1.0), (list(shares), "answers, %", 100.0), (own, "mean", 1.0)]
    groups.append((["base_perplexity"], "perplexity under the first model", 1.0))
    groups = [g for g in groups if seen & set(g[0])]
    if not groups:
        return None

    def draw(axes: list[Axes]) -> None:
        for axis, (names, label, scale) in zip(axes, groups, strict=True):
            for run in runs:
                for name in names:
                    points = [
                        (0, run.base.get(name)),
                        *((i.number, (i.compared or {}).get(name)) for i in run.iterations),
                    ]
                    known = [(x, scale * y) for x, y in points if y is not None]
                    if known:
                        axis.plot(
                            *zip(*known, strict=True),
                            marker="o",
                            label=name if len(runs) == 1 else f"{run.name}, {name}",
                        )
            _iterations(axis, [0, *(i.number for run in runs for i in run.iterations)], label)
            axis.set_ylim(bottom=0)
            axis.legend(fontsize=8)

    return picture(draw, len(groups))


def training(runs: list[Run]) -> str | None:
    """Loss and the rewards' margin over the steps of all iterations, one behind the other."""
    if not any(i.steps for run in runs for i in run.iterations):
        return None

    def draw(axes: list[Axes]) -> None:
        keys = {"loss": "loss", "beta2_loss": "loss × beta²", "rewards/margins": "margin of rewards, nats × beta"}
        for axis, (key, label) in zip(axes, keys.items(), strict=True):
            for number, run in enumerate(runs):
                start = 0
                for iteration in run.iterations:
                    points = [(start + s["step"], s[key]) for s in iteration.steps if key in s]
                    if points:
                        name = run.name if len(runs) > 1 and not start else None
                        axis.plot(*zip(*points, strict=True), color=COLOURS[number % len(COLOURS)], label=name)
                        start = points[-1][0]
                        axis.axvline(start, color=_INK, linewidth=0.5, alpha=0.4)
            axis.set_xlabel("step (a line ends an iteration)")
            axis.set_ylabel(label)
            if len(runs) > 1:
                axis.legend(fontsize=8)

    return picture(draw, 3)


def log_ratios(run: Run) -> str | None:
    """log pi/pi_t of chosen and rejected responses against what the loss asks for, over all steps."""
    beta = float(run.settings.get("beta") or 0)
    sides = ("chosen", "rejected")
    steps: list[tuple[int, dict[str, Any]]] = []
    for iteration in run.iterations:
        start = steps[-1][0] if steps else 0
        steps += [(start + s["step"], s) for s in iteration.steps if f"rewards/{sides[0]}_target" in s]
    if not beta or not steps:
        return None

    def draw(axes: list[Axes]) -> None:
        (axis,) = axes
        x = [number for number, _ in steps]
        for side, colour in zip(sides, COLOURS, strict=False):
            axis.plot(x, [s[f"rewards/{side}"] / beta for _, s in steps], color=colour, label=side)
            target = [s[f"rewards/{side}_target"] / beta for _, s in steps]
            axis.plot(x, target, color=colour, linestyle=":", label=f"{side}, target")
        axis.set_xlabel("step, of all iterations")
        axis.set_ylabel("log-ratio, nats")
        axis.legend(fontsize=8, ncols=2)

    return picture(draw)


def _per_iteration(run: Run, values: Callable[[Iteration], dict[str, Any]], label: str, bins: Any) -> str | None:
    known = [i for i in run.iterations if any(len(v) for v in values(i).values())]
    if not known:
        return None

    def draw(axes: list[Axes]) -> None:
        for axis, iteration in zip(axes, known, strict=True):
            axis.hist(
                list(values(iteration).values()),
                bins=bins,
                label=list(values(iteration)),
                histtype="step",
                linewidth=1.5,
            )
            axis.set_title(f"iteration {iteration.number}")
            axis.set_xlabel(label)
            axis.set_ylabel("pairs")
            axis.legend(fontsize=8)

    return picture(draw, len(known))


def rates(run: Run) -> str | None:
    """Histograms of p, p_win and p_lose."""
    return _per_iteration(run, lambda i: i.rates, "win rate", np.linspace(0, 1, 21))


def lengths(run: Run) -> str | None:
    """Histograms of the chosen and rejected responses' lengths."""
    longest = max((v.max() for i in run.iterations for v in i.lengths.values() if len(v)), default=1.0)
    sides = lambda i: {k: v for k, v in i.lengths.items() if k != "all"}  # noqa: E731 - both are small
    return _per_iteration(run, sides, "tokens", np.linspace(0, longest, 21))


def agreement(run: Run, most: float) -> str | None:
    """The engine's log-probs against the trainer's; `most` is what is usual."""
    known = [(i.number, i.trained["agreement"]) for i in run.iterations if i.trained and i.trained.get("agreement")]
    if not known:
        return None

    def draw(axes: list[Axes]) -> None:
        (axis,) = axes
        numbers = [n for n, _ in known]
        for key, label in (("largest_difference", "largest of a response"), ("mean_difference", "mean")):
            axis.plot(numbers, [max(a[key], 1e-9) for _, a in known], marker="o", label=label)
        axis.axhline(most, color=_INK, linestyle=":", linewidth=1)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")  # the scale's own needs a formula renderer
        axis.yaxis.set_minor_formatter(NullFormatter())
        _iterations(axis, numbers, "difference, nats a token")
        axis.legend()

    return picture(draw)


def seconds(run: Run) -> str | None:
    """How long each stage took."""
    known = [i for i in run.iterations if i.seconds]
    stages = list(dict.fromkeys(stage for i in known for stage in i.seconds))
    if not known:
        return None

    def draw(axes: list[Axes]) -> None:
        (axis,) = axes
        left = np.zeros(len(known))
        names = [f"iteration {i.number}" for i in known]
        for stage in stages:
            took = np.array([i.seconds.get(stage, 0.0) for i in known]) / 60
            axis.barh(names, took, left=left, label=stage)
            left += took
        axis.invert_yaxis()
        axis.set_xlabel("minutes")
        axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.25))

    return picture(draw, height=1.4 + 0.5 * len(known))

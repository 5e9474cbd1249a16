"""The drawings and plots of the README, each for a light and for a dark page.

    python docs/figures.py

Reads   the tables of docs/results.md, docs/ifeval-smollm2.json and docs/rspo.json, so that no number stands in two
        places.
Writes  docs/loop-*.svg (the method), docs/demo-*.svg (the demo's win rates), docs/ifeval-smollm2-*.svg (SmolLM2 on
        IFEval), docs/rspo-*.svg (RSPO beside SPPO on the demo).
Exit codes: 0 done, 1 failed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Theme:
    """Colours that can be read on GitHub's page of that name, also by colour-blind readers."""

    name: str
    text: str
    faint: str
    line: str
    box: str
    first: str
    second: str


LIGHT = Theme("light", "#1f2328", "#59636e", "#8c959f", "#f6f8fa", "#0969da", "#bc4c00")
DARK = Theme("dark", "#f0f6fc", "#9198a1", "#6e7681", "#161b22", "#58a6ff", "#f0883e")


# ---- the loop, drawn by hand ----

STEPS = [
    ("1. Generate", ["the policy draws", "K responses", "to every prompt"], "responses.parquet"),
    ("2. Rank", ["a preference model", "compares every two", "responses"], "ranking/"),
    ("3. Pair", ["the best and the worst", "response, by win rate,", "make a pair"], "train.parquet"),
    ("4. Train", ["win rates become", "targets of the policy's", "log-ratios"], "model/"),
]
BOX_WIDTH, BOX_HEIGHT, GAP, LEFT, TOP = 178, 122, 32, 100, 52


def loop(theme: Theme) -> str:
    """The four steps of an iteration, and the way back to the first one."""
    bottom = TOP + BOX_HEIGHT
    middle = TOP + BOX_HEIGHT / 2
    lefts = [LEFT + n * (BOX_WIDTH + GAP) for n in range(len(STEPS))]
    centres = [left + BOX_WIDTH / 2 for left in lefts]
    width, height = lefts[-1] + BOX_WIDTH + 12, bottom + 104
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif" text-anchor="middle">',
        "<title>The loop of SPPO: generate, rank, pair, train, and again with the new policy</title>",
        f'<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{theme.line}"/></marker></defs>',
    ]

    def text(x: float, y: float, words: str, size: int, colour: str, more: str = "") -> None:
        parts.append(f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" {more}>{words}</text>')

    def arrow(path: str) -> None:
        parts.append(f'<path d="{path}" fill="none" stroke="{theme.line}" stroke-width="2" marker-end="url(#head)"/>')

    # the boxes
    for (name, lines, file), left, centre in zip(STEPS, lefts, centres, strict=True):
        parts.append(
            f'<rect x="{left}" y="{TOP}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8" fill="{theme.box}" '
            f'stroke="{theme.line}"/>'
        )
        text(centre, TOP + 26, name, 17, theme.first, 'font-weight="600"')
        for n, line in enumerate(lines):
            text(centre, TOP + 50 + 19 * n, line, 14, theme.text)
        text(centre, bottom - 10, file, 12, theme.faint, 'font-family="ui-monospace, Consolas, monospace"')

    # from box to box, and the prompts into the first
    for left, following in zip(lefts, lefts[1:], strict=False):
        arrow(f"M{left + BOX_WIDTH + 4} {middle}H{following - 4}")
    text(34, middle + 5, "prompts", 15, theme.text)
    arrow(f"M68 {middle}H{LEFT - 4}")

    # which command does what: a bracket over its boxes
    for first, last, command in ((0, 2, "scripts/generate.sh"), (3, 3, "scripts/pipeline.sh")):
        start, end = lefts[first], lefts[last] + BOX_WIDTH
        parts.append(f'<path d="M{start} {TOP - 10}v-8H{end}v8" fill="none" stroke="{theme.line}"/>')
        text((start + end) / 2, TOP - 27, command, 13, theme.faint)

    # the way back: the trained model draws the next iteration's responses
    arrow(f"M{centres[-1]} {bottom + 4}V{bottom + 38}H{centres[0]}V{bottom + 6}")
    half = (centres[0] + centres[-1]) / 2
    text(
        half,
        bottom + 66,
        'the new policy <tspan font-style="italic">π</tspan><tspan font-size="11" dy="4">t+1</tspan>'
        '<tspan dy="-4"> draws the responses of the next iteration</tspan>',
        15,
        theme.text,
    )
    text(half, bottom + 90, "scripts/run.sh: three iterations are the paper's run", 13, theme.faint)
    return "\n".join([*parts, "</svg>"]) + "\n"


# ---- the plots ----


def demo_rows(page: str) -> list[list[float]]:
    """(iteration, ranker's win rate, rule's win rate) of the demo's first table, in percent."""
    found = re.findall(r"^ +([123]) +([\d.]+)% +([\d.]+)% ", page, re.MULTILINE)
    return [[float(cell) for cell in row] for row in found]


def axes_of(theme: Theme, count: int) -> tuple[Figure, list[Axes]]:
    """A transparent figure with `count` plots beside each other, in the theme's colours."""
    figure, grid = pyplot.subplots(1, count, figsize=(4.3 * count, 2.9), squeeze=False)
    figure.patch.set_alpha(0)
    for place in grid[0]:
        place.patch.set_alpha(0)
        place.grid(alpha=0.25, color=theme.line)
        place.tick_params(colors=theme.faint)
        place.set_xlabel("iteration", color=theme.faint)
        for side, spine in place.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.line)
    return figure, list(grid[0])


def save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    # matplotlib ends some lines with a space
    path.write_text(re.sub(r" +\n", "\n", path.read_text(encoding="utf-8")), encoding="utf-8")


def legend(place: Axes, theme: Theme, where: str) -> None:
    place.legend(frameon=False, labelcolor=theme.text, loc=where)


def demo_plot(theme: Theme, page: str) -> Figure:
    """How often each iteration's answers beat the first model's."""
    iterations, ranker, rule = zip(*demo_rows(page), strict=True)
    figure, (place,) = axes_of(theme, 1)
    place.plot(iterations, ranker, marker="o", color=theme.first, label="by the ranker")
    place.plot(iterations, rule, marker="s", linestyle="--", color=theme.second, label="by the rule itself")
    place.axhline(50, color=theme.faint, linewidth=1, linestyle=":")
    place.set(xticks=iterations, ylim=(40, 100))
    place.set_title("The demo: wins against the first model, %", color=theme.text, fontsize=11)
    legend(place, theme, "upper left")
    return figure


def ifeval_plot(theme: Theme, store: dict[str, Any]) -> Figure:
    """A line a seed: what IFEval counts, and the first model's perplexity on answers to other prompts."""
    first = store["first"]["ifeval"]
    figure, (followed, perplexity) = axes_of(theme, 2)
    styles = zip(store["seeds"].items(), ("-", "--", ":"), ("o", "s", "^"), strict=False)
    for (seed, run), line, marker in styles:
        reached = [first, *(model["ifeval"] for model in run["models"][1:])]
        unusual = [model["measures"]["base_perplexity"] for model in run["models"]]
        look = {"linestyle": line, "marker": marker, "label": f"seed {seed}"}
        errors = [of["instruction_strict_standard_error"] for of in reached]
        shares = [of["instruction_strict_percent"] for of in reached]
        followed.errorbar(range(len(shares)), shares, errors, color=theme.first, capsize=2, elinewidth=0.7, **look)
        perplexity.plot(range(len(unusual)), unusual, color=theme.second, **look)
    followed.set(xticks=range(len(shares)), ylim=(0, 60))
    perplexity.set(xticks=range(len(unusual)), ylim=(0, 6))
    followed.set_title("IFEval, instructions followed, %", color=theme.text, fontsize=11)
    perplexity.set_title("First model's perplexity on the answers", color=theme.text, fontsize=11)
    for place in (followed, perplexity):
        legend(place, theme, "lower right")
    return figure


def rspo_plot(theme: Theme, store: dict[str, Any]) -> Figure:
    """A line a method, a point an iteration: wins by the demo's rule, by how far the model has gone."""
    figure, (place,) = axes_of(theme, 1)
    looks = (("-", "o", theme.first), ("--", "s", theme.second), (":", "^", theme.text), ("-.", "v", theme.faint))
    methods = {"": "SPPO", "reverse:0.5": "reverse 0.5", "forward:0.1": "forward 0.1", "both:0.1": "both 0.1"}
    for (reg, name), (line, marker, colour) in zip(methods.items(), looks, strict=True):
        steps = list(zip(*(run["by_iteration"] for run in store["demo"][reg].values()), strict=True))
        gone, wins = ([median(of[key] for of in step) for step in steps] for key in ("kl", "rule_win_rate"))
        place.plot(gone, [100 * x for x in wins], line, marker=marker, color=colour, label=name)
    place.set_xlabel("KL from the first model, nats an answer", color=theme.faint)
    place.set_title("The demo: wins by the rule, %", color=theme.text, fontsize=11)
    legend(place, theme, "lower right")
    return figure


def main() -> None:
    pyplot.rcParams.update({"svg.hashsalt": "sppo", "font.size": 10})  # the same file each time
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    ifeval, rspo = (
        json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8")) for name in ("ifeval-smollm2", "rspo")
    )
    for theme in (LIGHT, DARK):
        (DOCS / f"loop-{theme.name}.svg").write_text(loop(theme), encoding="utf-8")
        save(demo_plot(theme, page), DOCS / f"demo-{theme.name}.svg")
        save(rspo_plot(theme, rspo), DOCS / f"rspo-{theme.name}.svg")
        if ifeval["seeds"]:  # as far as it is measured
            save(ifeval_plot(theme, ifeval), DOCS / f"ifeval-smollm2-{theme.name}.svg")


if __name__ == "__main__":
    main()

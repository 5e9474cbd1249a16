"""The game with a real model: the demo's small Mistral, through the drivers, under a preference that goes round.

    python benchmarks/game.py --only model --output_dir docs

The judge is examples.demo:circle: rock, paper, scissors over the leading colours of answers, and all beat an answer
without a colour. What counts of a policy is how often its answers are of each class. That is measured on held-out
prompts, so it has an interval; the gap of the measured shares is exact, as in the tables' game. One mixture for all
prompts is looked for that beats the policy, so a policy that does something else for each prompt may be beaten by
more."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from warm_python import call, share_first_answers, warm_python

from examples.demo import CIRCLE, CLASSES, colour_class, make_demo
from sppo.cli import flags
from sppo.command.search_path import ROOT
from sppo.method.preference import Array, sigmoid
from sppo.store.parquet import read_rows

PREFERENCE = sigmoid(np.array(CIRCLE))  # (classes, classes)
ITERATIONS, PROMPTS, ANSWERS = 6, 96, 3  # of a run; for each iteration; for each held-out prompt
EPOCHS = 2
DRAWS = 1000  # of the bootstrap over prompts
ANCHOR = 0.1
METHODS = {
    "SPPO, paper's estimator": ["--estimator=paper"],
    "SPPO, released estimator": ["--estimator=released"],
    "SPPO, all K responses": ["--loss_type=sppo_all"],
    "iterated DPO": ["--loss_type=sigmoid"],
    "IPO": ["--loss_type=ipo"],
    f"SPPO, anchored ({ANCHOR:g})": [f"--anchor={ANCHOR:g}"],
}


@dataclass
class Played:
    """A run: the classes' shares by prompt, of each iterate, (T + 1, N, classes), and of the mean weights."""

    shares: Array
    average: Array  # (N, classes)

    def matrix(self) -> Array:
        """How often the row's iterate beats the column's, over all pairs of answers to the same prompt."""
        return np.einsum("inc,cd,jnd->ij", self.shares, PREFERENCE, self.shares) / self.shares.shape[1]


def shares(responses: Path) -> Array:
    """The share of each class among each prompt's answers, (N, classes)."""
    rows = read_rows(responses, ["responses"])
    classes = [[colour_class(answer["text"]) for answer in row["responses"]] for row in rows]
    return np.eye(CLASSES)[np.array(classes)].mean(1)


def gap(policy: Array) -> Array:
    """2 (max_i P(i > policy) - 1/2), (..., classes) -> (...): 0 where no class beats it in more than half."""
    return 2 * ((policy @ PREFERENCE.T).max(-1) - 0.5)


def gap_interval(by_prompt: Array) -> tuple[float, float]:
    """95% of the bootstrap of a policy's gap over prompts, (N, classes). The gap's noise is never below 0."""
    n = len(by_prompt)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS) / n  # (draws, N)
    low, high = np.quantile(gap(drawn @ by_prompt), (0.025, 0.975))
    return float(low), float(high)


def run(
    python: str, world: Path, directory: Path, seed: int, method: list[str], first: Future[Played] | None
) -> Played:
    """One run by the driver, then the answers of its models and of their mean weights. Started again, it goes on.

    `first` is the first method's run of that seed: what does not depend on the method is taken from it.
    """
    if first:
        first.result()
        share_first_answers(directory.parent / f"0-{seed}", directory, "answers-0")
    policy, average = world / "policy", directory / "average"
    common = flags(recipe=ROOT / "recipes" / "sppo" / "demo.yaml", seed=seed)
    driver = ["bash", "run_sppo_mistral.sh", *common, "--skip_preflight", *flags(run_dir=directory, name="game")]
    driver += flags(model=policy, prompts=directory.parent / "prompts.jsonl", iterations=ITERATIONS, gpus="none")
    driver += flags(ranker="examples.demo:circle", num_train_epochs=EPOCHS)
    commands = [[*driver, *method]]
    commands += [[python, "scripts/average.py", *flags(run_dir=directory, base=policy, output_dir=average)]]
    models = [policy, *(directory / f"iter{i}" / "model" for i in range(1, ITERATIONS + 1)), average]
    answers = [directory / f"answers-{number}" for number in range(len(models))]
    draw = [python, "scripts/generate.py", *common, *flags(prompts=world / "heldout.jsonl", pairs=ANSWERS)]
    commands += [[*draw, *flags(model=m, output_dir=out)] for m, out in zip(models, answers, strict=True)]
    for command in commands:
        call(python, command, Path(f"{directory}.log"))
    found = [shares(out / "responses.parquet") for out in answers]
    return Played(np.array(found[:-1]), found[-1])


def played(work: Path, seeds: Sequence[int]) -> dict[str, list[Played]]:
    """By method: a run for each seed, two at a time. The world, so the first policy, is the same for all."""
    world = work / "world"
    with warm_python() as python, ThreadPoolExecutor(2) as pool:
        if not world.exists():
            make_demo(world, 42, ranker=False)  # the game's judge is a function
        lines = (world / "train.jsonl").read_text().splitlines(keepends=True)
        (work / "prompts.jsonl").write_text("".join(lines[:PROMPTS]))
        jobs: dict[str, list[Future[Played]]] = {}
        for number, (name, method) in enumerate(METHODS.items()):
            firsts = next(iter(jobs.values()), [None] * len(seeds))
            jobs[name] = [
                pool.submit(run, python, world, work / f"{number}-{seed}", seed, method, first)
                for seed, first in zip(seeds, firsts, strict=True)
            ]
        return {name: [job.result() for job in runs] for name, runs in jobs.items()}


def figures(runs: list[Played]) -> dict[str, Array]:
    """Of the seeds' runs: gap of each iterate and of the mixture so far, entropy, (seeds, T + 1); of mean weights."""
    policies = np.array([each.shares.mean(1) for each in runs])  # (seeds, T + 1, classes)
    mixtures = policies.cumsum(1) / np.arange(1, policies.shape[1] + 1)[:, None]
    entropy = -(policies * np.log(np.maximum(policies, 1e-12))).sum(-1)
    average = gap(np.array([each.average.mean(0) for each in runs]))  # (seeds,)
    return {"last": gap(policies), "mixture": gap(mixtures), "entropy": entropy, "average": average}


def table(found: dict[str, list[Played]], seeds: Sequence[int]) -> str:
    """game-model.md."""
    best = von_neumann()
    width = np.mean([np.subtract(*gap_interval(x)[::-1]) for runs in found.values() for r in runs for x in r.shares])
    lines = [
        "# A model in a game that goes round in circles",
        "",
        "This page is for you if you want to see whether a real model circles when no answer is best.",
        "",
        *("```bash", f"python benchmarks/game.py --only model --seeds {' '.join(map(str, seeds))}", "```"),
        "",
        f"The demo's small Mistral runs {ITERATIONS} iterations of {PROMPTS} prompts by `run_sppo_mistral.sh`.",
        "The judge is `--ranker examples.demo:circle`, which knows four classes of answers.",
        "The leading colour is of the first, second or third kind, each of which beats the next.",
        "An answer without a colour loses to all.",
        "",
        f"- Shares of the classes are measured on 150 held-out prompts, with {ANSWERS} answers each.",
        f"- The gap's 95% interval (bootstrap over prompts) is {width:.3f} wide on average.",
        f"- Figures are medians over {len(seeds)} seeds of sampling and training.",
        "  In brackets are the lowest and the highest.",
        "- The *gap* is 0 where no class beats the policy more often than it is beaten.",
        f"- The policy that nothing beats has shares of {', '.join(f'{x:.2f}' for x in best)}.",
        "- *Mixture*: one of all models so far, the first too, is drawn for each answer.",
        "- *Mean weights*: `scripts/average.py` of the same models.",
        "",
        "![gaps over the iterations](game-model.png)",
        "",
        f"| method | gap at the start | 1 iteration | 3 | {ITERATIONS} | mixture, 3 | mixture, {ITERATIONS} | mean "
        f"weights | entropy at the start | entropy, {ITERATIONS} |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        f = figures(runs)
        cells = [f["last"][:, 0], f["last"][:, 1], f["last"][:, 3], f["last"][:, -1]]
        cells += [f["mixture"][:, 3], f["mixture"][:, -1], f["average"], f["entropy"][:, 0], f["entropy"][:, -1]]
        shown = [f"{np.median(c):.2f} ({c.min():.2f} to {c.max():.2f})" for c in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    for name, runs in found.items():
        lines += ["", f"{name}, seed {seeds[0]}: how often the row's answers beat the column's, by the judge", ""]
        lines.append("| | " + " | ".join(f"iter{i}" for i in range(ITERATIONS + 1)) + " |")
        lines.append("|---" * (ITERATIONS + 2) + "|")
        for i, row in enumerate(runs[0].matrix()):
            lines.append(f"| iter{i} | " + " | ".join("" if i == j else f"{x:.3f}" for j, x in enumerate(row)) + " |")
    return "\n".join(lines) + "\n"


def von_neumann() -> Array:
    """The shares of classes that nothing beats."""
    from sppo.evaluation.matrix import von_neumann_winner

    return von_neumann_winner(PREFERENCE)[0]


def picture(found: dict[str, list[Played]], path: Path) -> None:
    """Gaps of the last iterate, of the mixture, and the classes' shares of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1 + (len(found) + 1) // 2, figsize=(15, 6.6))
    for name, runs in found.items():
        f = figures(runs)
        for place, key in zip(axes[:, 0], ("last", "mixture"), strict=True):
            place.plot(np.median(f[key], 0), marker=".", label=name)
            place.set(title=f"gap of the {'last iterate' if key == 'last' else 'mixture so far'}, median", ylim=(0, 1))
    axes[0][0].legend(fontsize=7)
    for place, (name, runs) in zip(axes[:, 1:].flat, found.items(), strict=False):
        for label, line in zip(("first", "second", "third", "none"), runs[0].shares.mean(1).T, strict=True):
            place.plot(line, label=label)
        place.set(title=f"{name}: classes' shares", ylim=(0, 1))
    axes[0][1].legend(fontsize=7)
    for place in axes.flat:
        place.grid(alpha=0.3)
        place.set_xlabel("iteration")
    figure.tight_layout()
    figure.savefig(path, dpi=100)

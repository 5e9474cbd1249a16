"""A preference that goes round in circles: which method reaches the von Neumann winner, and with which policy.

    python benchmarks/game.py --output_dir docs

One prompt, N answers, a softmax policy over them, and a table of preferences without a best answer: rock, paper,
scissors with unequal stakes, or a random table. Each method's own update is done exactly, without sampling or a
network, so what is seen is the method and nothing else. The gap of a policy is 2 (max_i P(i > policy) - 1/2): 0 for
the von Neumann winner, which nothing beats more often than it is beaten. A method with a divergence from the first
policy ends in the equilibrium of another game, which is solved by itself and compared with. Then the same with a real
model through the real pipeline (model_game.py).
Reads   nothing.
Writes  <output_dir>/game.md (tables, medians over the seeds) and game.png, in a minute on a CPU; game-model.md and
        game-model.png, in about 20 minutes on two cores, with the runs in <work_dir>, where a stopped one goes on.
Exit codes: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from sppo.method.preference import Array, sigmoid

ETA = 1.0  # 1/beta: the step
ANCHOR = 0.1
K = 5  # responses a prompt of the method that trains on the best and the worst of them
STEPS = 400
SEEDS = range(42, 47)

# (P, log pi, log pi_0, rng) -> the next log pi, without its normaliser: (N, N), (N,), (N,) -> (N,)
Step = Callable[[Array, Array, Array, np.random.Generator], Array]


def wins(preference: Array, policy: Array) -> Array:
    """P(i > policy) of each answer, (N, N), (N,) -> (N,)."""
    return preference @ policy


def renormed(logps: Array) -> Array:
    """The policy of log-probabilities without their normaliser."""
    shifted = np.exp(logps - logps.max())
    return shifted / shifted.sum()


def normed(logps: Array) -> Array:
    """Log-probabilities with their normaliser."""
    return logps - np.logaddexp.reduce(logps)


def sppo(preference: Array, logps: Array, _: Array, __: np.random.Generator) -> Array:
    """log pi' = log pi + eta P(y > pi) - log Z, the paper's equation 4.4; all K responses (sppo_all) reach it.

    Online IPO's exact step is the same: the pairs' least squares over h_i - h_j = (P_ij - P_ji) / (2 tau), weighted by
    the policy, has h_i = (P(i > pi) - 1/2) / tau, so tau = beta.
    """
    return logps + ETA * wins(preference, renormed(logps))


def sppo_released(preference: Array, logps: Array, _: Array, __: np.random.Generator) -> Array:
    """The same with the released scripts' estimator: P_ij = sigmoid(s_i - s_j), which cannot go round in circles."""
    policy = renormed(logps)
    logits = np.log(preference / preference.T)  # (C_ij - C_ji) / 2 of the ranker
    scores = 2 * logits @ policy
    return logps + ETA * (sigmoid(scores[:, None] - scores[None, :]) @ policy)


def sppo_pairs(preference: Array, logps: Array, _: Array, rng: np.random.Generator, draws: int = 4000) -> Array:
    """What SPPO trains on: of K responses the best and the worst, each to eta (its win rate among the K - 1/2).

    The least squares over log pi'(y) / pi(y): each answer's mean target, over how often it is in a pair; answers in no
    pair keep their odds. The expectation is over `draws` drawn sets.
    """
    drawn = rng.choice(len(logps), (draws, K), p=renormed(logps))
    rate = preference[drawn[:, :, None], drawn[:, None, :]].mean(-1)  # (draws, K)
    total, count = np.zeros(len(logps)), np.zeros(len(logps))
    rows = np.arange(draws)
    for best in (rate.argmax(1), rate.argmin(1)):
        np.add.at(total, drawn[rows, best], rate[rows, best] - 0.5)
        np.add.at(count, drawn[rows, best], 1)
    return logps + ETA * total / np.maximum(count, 1)


def dpo(preference: Array, logps: Array, _: Array, __: np.random.Generator) -> Array:
    """Iterated DPO: beta log pi'/pi are the Bradley-Terry scores that fit the preferences of pairs drawn from pi best.

    Newton's method on sum_j pi_j (P_ij - sigmoid(h_i - h_j)) = 0 for each i, which is the gradient over pi_i, so that
    an answer that is hardly ever drawn has its exact score too. The likeliest answer's score is 0; beta is 1 / eta.
    """
    policy, likeliest = renormed(logps), int(logps.argmax())
    free = np.arange(len(logps)) != likeliest
    scores = np.zeros(len(logps))
    for _step in range(100):
        fitted = sigmoid(scores[:, None] - scores[None, :])
        slope = policy[None, :] * fitted * (1 - fitted)
        missing = ((preference - fitted) @ policy)[free]
        step = np.linalg.solve((np.diag(slope.sum(1)) - slope)[np.ix_(free, free)], missing)
        scores[free] += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            return logps + ETA * scores
    raise RuntimeError("Newton's method did not come to an end")


def anchored(preference: Array, logps: Array, first: Array, _: np.random.Generator) -> Array:
    """SPPO with an anchor: (1 - A) log pi + A log pi_0 + eta P(y > pi) - log Z (arXiv 2206.05825)."""
    return (1 - ANCHOR) * logps + ANCHOR * first + ETA * wins(preference, renormed(logps))


class Price(NamedTuple):
    """What a side pays for the divergence of its policy from the first one."""

    reverse: float = 0.0  # times KL(policy || first)
    forward: float = 0.0  # times KL(first || policy)


def rspo(weight: Price) -> Step:
    """RSPO's exact step: `weight` holds lambda, by divergence, as in sppo.method.loss.divergence.

    Over all policies pi' the minimum of sum_y pi(y) [1/2 (a - eta (P(y > pi) - 1/2))^2 + lambda_r d^2 + lambda_f
    exp(-d)], with a = log pi'(y) / pi(y) and d = log pi'(y) / pi_0(y); R plays no part as long as no d is below -10. It
    has no closed form, because pi' adds up to 1: Newton's method on the gradient over each log pi'(y), which is mu
    pi'(y), and on that sum, for all a and mu.
    """

    def step(preference: Array, logps: Array, first: Array, _: np.random.Generator) -> Array:
        policy = renormed(logps)
        moved = normed(logps) - normed(first)
        target = ETA * (wins(preference, policy) - 0.5)
        a, mu = np.zeros(len(logps)), 0.0
        for _step in range(200):
            grown, back = np.exp(a), np.exp(-(moved + a))
            gradient = a - target + 2 * weight.reverse * (moved + a) - weight.forward * back - mu * grown
            slope = 1 + 2 * weight.reverse + weight.forward * back - mu * grown
            change = (1 - policy @ grown + policy @ (grown * gradient / slope)) / (policy @ (grown**2 / slope))
            by = (change * grown - gradient) / slope
            share = min(1.0, 1 / max(np.abs(by).max(), 1e-300))
            a, mu = a + share * by, mu + share * change
            if np.abs(by).max() < 1e-11:
                return logps + a
        raise RuntimeError("Newton's method did not come to an end")

    return step


def equilibrium(preference: Array, first: Array, price: Price) -> Array:
    """The policy that both sides play in the game where each pays that price, (N, N), (N,) -> (N,).

    Where neither gains by a change, P(i > policy) - reverse log(policy_i / first_i) + forward first_i / policy_i is
    the same for all i. The divergences are strictly convex, so there is one such policy. Solved with a high price,
    which keeps it at the first policy, and followed down to the price that is asked for.
    """
    from scipy.optimize import root

    start = normed(first)

    def apart(found: Array, times: float) -> Array:
        moved = found[:-1] - start
        pays = times * (price.reverse * moved - price.forward * np.exp(-moved))
        return np.append(wins(preference, np.exp(found[:-1])) - pays - found[-1], np.exp(found[:-1]).sum() - 1)

    found = np.append(start, 0.5)
    for times in np.geomspace(100, 1, 40):
        found = root(apart, found, args=(times,), tol=1e-13).x
    if np.abs(apart(found, 1.0)).max() > 1e-9:
        raise RuntimeError("the equilibrium was not found")
    return np.exp(found[:-1])


# lambda, by divergence; with the first one its game is that of the anchor, and the last one is too small for the step
REGS = {
    f"reverse KL ({ANCHOR / 2:g})": Price(reverse=ANCHOR / 2),
    "forward KL (0.1)": Price(forward=0.1),
    "both (0.05)": Price(0.05, 0.05),
    "reverse KL (0.003)": Price(reverse=0.003),
}
METHODS: dict[str, Step] = {
    "SPPO (and IPO), exact step": sppo,
    "SPPO, released estimator": sppo_released,
    f"SPPO, best and worst of {K}": sppo_pairs,
    "iterated DPO": dpo,
    f"SPPO, anchored ({ANCHOR:g})": anchored,
    **{f"RSPO, {name}": rspo(weight) for name, weight in REGS.items()},
}
# The game that a method with a pull ends in. Where RSPO's step stays (a = 0), its gradient over log pi(y) is
# pi(y) (2 lambda_r d - lambda_f exp(-d) - eta (P(y > pi) - 1/2)) = mu pi(y): the price is 2 lambda_r and lambda_f,
# over eta.
PRICES = {
    f"SPPO, anchored ({ANCHOR:g})": Price(ANCHOR / ETA),
    **{f"RSPO, {name}": Price(2 * weight.reverse / ETA, weight.forward / ETA) for name, weight in REGS.items()},
}


def scissors(rng: np.random.Generator) -> Array:
    """Rock, paper, scissors: each beats the next, by a stake of its own."""
    logits = np.zeros((3, 3))
    for i, stake in enumerate(rng.uniform(0.5, 3, 3)):
        logits[i, (i + 1) % 3], logits[(i + 1) % 3, i] = stake, -stake
    return sigmoid(logits)


def random_table(rng: np.random.Generator, count: int = 10) -> Array:
    """Preferences of `count` answers without any order: each pair's log-odds are drawn by themselves."""
    logits = np.triu(rng.normal(0, 2, (count, count)), 1)
    return sigmoid(logits - logits.T)


GAMES = {"rock, paper, scissors": scissors, "random, 10 answers": random_table}


def gap(preference: Array, policy: Array) -> float:
    """The duality gap of the symmetric game at a policy played by both sides."""
    return float(2 * (wins(preference, policy).max() - 0.5))


def play(step: Step, preference: Array, seed: int, price: Price | None = None) -> dict[str, Array]:
    """Gap of the last iterate and of the mean of all so far, the entropy, and with a `price` the distance from that
    game's equilibrium, half the sum of the differences, after each step: (STEPS + 1,) each."""
    rng = np.random.default_rng(seed)
    logps = first = np.log(renormed(rng.normal(0, 1, len(preference))))
    total = np.zeros(len(preference))
    end = equilibrium(preference, first, price) if price else None
    found: dict[str, list[float]] = {"last": [], "mean": [], "entropy": [], "apart": [], "end": []}
    for count in range(1, STEPS + 2):
        policy = renormed(logps)
        total += policy
        found["last"].append(gap(preference, policy))
        found["mean"].append(gap(preference, total / count))
        found["entropy"].append(float(-(policy * np.log(np.maximum(policy, 1e-300))).sum()))
        if end is not None:
            found["apart"].append(float(np.abs(policy - end).sum() / 2))
            found["end"].append(gap(preference, end))
        logps = step(preference, logps, first, rng)
        logps = logps - logps.max()
    return {name: np.array(values) for name, values in found.items()}


def played() -> dict[str, dict[str, dict[str, Array]]]:
    """By game and method: the medians over the seeds, (STEPS + 1,) each."""
    found: dict[str, dict[str, dict[str, Array]]] = {}
    for game, make in GAMES.items():
        tables = [make(np.random.default_rng(seed)) for seed in SEEDS]
        found[game] = {}
        for name, step in METHODS.items():
            runs = [play(step, table, seed, PRICES.get(name)) for table, seed in zip(tables, SEEDS, strict=True)]
            found[game][name] = {key: np.median([run[key] for run in runs], axis=0) for key in runs[0]}
    return found


def table(found: dict[str, dict[str, dict[str, Array]]]) -> str:
    """game.md."""
    lines = [
        "# A preference that goes round in circles",
        "",
        "This page is for you if you want to see where each method goes when no answer is best.",
        "",
        *("```bash", "python benchmarks/game.py --only tables --output_dir docs", "```"),
        "",
        f"Figures are medians over {len(SEEDS)} seeds (tables and first policies).",
        "",
        "- The *gap* is 0 where nothing beats the policy more often than it is beaten.",
        "- *last* is the newest policy, *mean* the mixture of all policies so far.",
        f"- One step is an exact update with eta = {ETA:g}. A run has three steps; {STEPS} show where the method goes.",
        "",
        "![gaps over the steps](game.png)",
        "",
        "| game | method | gap at the start | last, 3 steps | last, 50 | last, 400 | mean, 50 | mean, 400 "
        "| entropy, 400 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for game, methods in found.items():
        for name, run in methods.items():
            cells = [
                run["last"][0],
                run["last"][3],
                run["last"][50],
                run["last"][400],
                run["mean"][50],
                run["mean"][400],
            ]
            shown = " | ".join(f"{x:.3f}" for x in [*cells, run["entropy"][400]])
            lines.append(f"| {game} | {name} | {shown} |")
    return "\n".join([*lines, *pulled(found)]) + "\n"


def pulled(found: dict[str, dict[str, dict[str, Array]]]) -> list[str]:
    """game.md's part about the methods with a divergence from the first policy."""
    lines = [
        "",
        "## Where a pull towards the first policy ends",
        "",
        "A method with a pull solves another game. Each side also pays for how far its policy is from the first one:",
        "",
        *("```math", r"\tau_r \mathrm{KL}(\pi \Vert \pi_0) + \tau_f \mathrm{KL}(\pi_0 \Vert \pi)", "```"),
        "",
        r"| | $\tau_r$ | $\tau_f$ |",
        "|---|---|---|",
        r"| `--anchor A` | $A / \eta$ | 0 |",
        r"| `--reg reverse --reg_coef L` | $2 L / \eta$ | 0 |",
        r"| `--reg forward --reg_coef L` | 0 | $L / \eta$ |",
        r"| `--reg both --reg_coef L` | $2 L / \eta$ | $L / \eta$ |",
        "",
        "That game has one equilibrium. In it this is the same for every $y$:",
        "",
        "```math",
        r"P(y \succ \pi) - \tau_r \log \frac{\pi(y)}{\pi_0(y)} + \tau_f \frac{\pi_0(y)}{\pi(y)}",
        "```",
        "",
        "`divergence` in `sppo/method/loss.py` derives it. The equilibrium is solved without the method's steps.",
        "*Distance* is half the sum of the differences between the method's policy and the equilibrium.",
        "",
        "- The larger the price, the nearer the end is to the first policy, and the larger is its gap in the game",
        "  without the price.",
        "- With too small a weight for the step, a method never gets there. It circles, as without a pull.",
        r"- Near the end, a step of reverse gets nearer where $(\eta \omega)^2 < 4 \lambda (1 + \lambda - \mu)$. Here",
        r"  $\pm i \omega$ are the largest eigenvalues of $(P - \tfrac12) \mathrm{diag}(\pi)$, and",
        r"  $\mu = 2 \lambda \mathrm{KL}(\pi \Vert \pi_0)$.",
        r"- At the paper's $\eta = 1000$ that asks for $\omega$ below 0.002, even with $\lambda = 0.5$. So this page",
        "  shows where a method heads, and not what a run of a few iterations reaches.",
        "",
        "| game | method | gap of the end | distance at the start | 3 steps | 50 | 400 |",
        "|---|---|---|---|---|---|---|",
    ]
    for game, methods in found.items():
        for name in PRICES:
            run = methods[name]
            shown = " | ".join(f"{run['apart'][n]:.3f}" for n in (0, 3, 50, 400))
            lines.append(f"| {game} | {name} | {run['end'][0]:.3f} | {shown} |")
    return lines


def picture(found: dict[str, dict[str, dict[str, Array]]], path: Path) -> None:
    """The gaps over the steps: a row a game, last iterate on the left, mean of all on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 2, figsize=(11, 3.6 * len(found)), sharex=True, sharey="row")
    for row, (game, methods) in zip(axes, found.items(), strict=True):
        for place, key in zip(row, ("last", "mean"), strict=True):
            for name, run in methods.items():
                place.plot(np.maximum(run[key], 1e-6), label=name)
            place.set(title=f"{game}: {'last iterate' if key == 'last' else 'mean of all iterates'}", yscale="log")
            place.grid(alpha=0.3)
        row[0].set_ylabel("gap (0: nothing beats it)")
    for place in axes[-1]:
        place.set_xlabel("step")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("docs"), help="%(default)s")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/game"), help="%(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the model's game (42 to 46)")
    parser.add_argument("--only", choices=("tables", "model"), help="one of the two games")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.only != "model":
        found = played()
        (args.output_dir / "game.md").write_text(table(found), encoding="utf-8")
        picture(found, args.output_dir / "game.png")
        print(table(found))
    if args.only != "tables":
        import model_game  # here: it imports torch

        runs = model_game.played(args.work_dir.absolute(), args.seeds)
        made = model_game.table(runs, args.seeds)
        (args.output_dir / "game-model.md").write_text(made, encoding="utf-8")
        model_game.picture(runs, args.output_dir / "game-model.png")
        print(made)


if __name__ == "__main__":
    main()

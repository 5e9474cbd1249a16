"""The report after an iteration: held-out prompts answered by the base model and by the new one, and compared.

Win rates are means of P(new > base) over all pairs of a prompt's responses, by the ranker and, beside it, by a second
judge: a PairRM can be fooled by length, so lengths stand beside it too.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sppo.config import ROOT, Recipe
from sppo.errors import SPPOError, UsageError
from sppo.files import digest, read_json, read_rows, write_json
from sppo.launch import flags
from sppo.manifest import Stage
from sppo.models import model_identity, resolve

Judge = Callable[[str, str, str], float]


def load_judge(name: str) -> Judge:
    """The function module:function(prompt, a, b) -> logit, above 0 where a is better. Raises UsageError."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--judge {name}: not a module:function that can be imported ({error})") from None


def report(recipe: Recipe, run_dir: Path, iteration: int, base: str, gpus: str, world_size: int) -> None:
    """Answer recipe.eval_prompts with the base and with iteration's model, compare, and write summary.json."""
    judge_name = recipe.judge.partition(":")[2]
    if recipe.judge:
        load_judge(recipe.judge)
    before = _answers(recipe, run_dir / "iter0", base, gpus, world_size)
    here = run_dir / f"iter{iteration}"
    after = _answers(recipe, here, str(here / "model"), gpus, world_size)
    ranker = resolve(recipe.ranker, recipe.ranker_revision, "ranker")
    output = here / "eval" / "report.json"
    stage = Stage(
        "report",
        here / "eval" / "report.manifest.json",
        [output],
        inputs={"before": digest(before), "after": digest(after), "ranker": model_identity(ranker)},
        settings={"iteration": iteration, "judge": recipe.judge, "ranker_prompt": recipe.ranker_prompt},
    )
    if not stage.is_done():
        stage.begin()
        row = {"iteration": iteration, **_compare(recipe, ranker, before, after, judge_name)}
        trained = read_json(here / "model" / "sppo_manifest.json")
        row.update(loss=trained["loss"], beta2_loss=trained["beta2_loss"])
        write_json(output, row)
        stage.finish({"prompts": row["prompts"]})
    rows = [read_json(p) for i in range(1, iteration + 1) if (p := run_dir / f"iter{i}/eval/report.json").exists()]
    write_json(run_dir / "summary.json", rows)
    print_table(rows)


def _answers(recipe: Recipe, directory: Path, model: str, gpus: str, world_size: int) -> Path:
    """directory/eval/responses.parquet: eval_pairs responses to each held-out prompt, drawn as in training."""
    out = directory / "eval"
    common = flags(output_dir=out, pairs=recipe.eval_pairs)
    keys = "prompt_column prompt_split temperature top_p maxlen engine seed prompt_seeds system_prompt".split()
    settings = flags(**{k: getattr(recipe, k) for k in (*keys, "gpu_memory_utilization")}, world_size=world_size)
    settings += flags(chat_template_kwargs=json.dumps(recipe.chat_template_kwargs))
    launch = [sys.executable, "-m", "sppo.launch", "shards", "--name=eval"]
    launch += flags(gpus=gpus, logs=directory / "logs", world_size=world_size)
    generate = [sys.executable, str(ROOT / "scripts/generate.py"), *flags(model=model, prompts=recipe.eval_prompts)]
    _run([*launch, "--", *generate, *common, *settings])
    shards = len(list((out / "responses").glob("shard-*.manifest.json")))
    _run([sys.executable, str(ROOT / "scripts/combine_generate.py"), *common, *flags(numgpu=shards)])
    return out / "responses.parquet"


def _run(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SPPOError(f"the report's answers failed:\n{done.stdout}")


def _compare(recipe: Recipe, ranker_dir: Path, before: Path, after: Path, judge_name: str) -> dict[str, Any]:
    from sppo.pairrm import load_pairrm
    from sppo.ranking import prompt_renderer
    from sppo.winrates import sigmoid

    columns = ["prompt_id", "prompt", "responses"]
    old = {row["prompt_id"]: row for row in read_rows(before, columns)}
    new = {row["prompt_id"]: row for row in read_rows(after, columns)}
    if set(old) != set(new):
        raise SPPOError(f"{before} and {after} answer different prompts; delete the eval directories and report again")
    ranker, rendered = load_pairrm(ranker_dir, recipe.batch_tokens), prompt_renderer(recipe)
    inputs = []
    judged: list[float] = []
    judge = load_judge(recipe.judge) if recipe.judge else None
    for prompt_id, row in new.items():
        text = rendered(row["prompt"])
        source = ranker.encode_source(text)
        ours, theirs = ([r["text"] for r in side["responses"]] for side in (row, old[prompt_id]))
        for a in ours:
            for b in theirs:
                first, second = ranker.encode_candidate(a, len(source)), ranker.encode_candidate(b, len(source))
                inputs += [ranker.pair_input(source, first, second), ranker.pair_input(source, second, first)]
                if judge:
                    judged.append(float(sigmoid((judge(text, a, b) - judge(text, b, a)) / 2)))
    logits = ranker.logits(inputs)
    wins = [float(sigmoid((logits[i] - logits[i + 1]) / 2)) for i in range(0, len(logits), 2)]
    result = {"prompts": len(new), "ranker_win_rate": round(sum(wins) / len(wins), 4)}
    if judge:
        result[f"{judge_name}_win_rate"] = round(sum(judged) / len(judged), 4)
    for name, side in (("mean_tokens", new), ("base_mean_tokens", old)):
        lengths = [len(r["token_ids"]) for row in side.values() for r in row["responses"]]
        result[name] = round(sum(lengths) / len(lengths), 2)
    return result


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows of summary.json, for a person."""
    names = [
        "iteration",
        *[k for k in rows[0] if k.endswith("_win_rate")],
        "mean_tokens",
        "base_mean_tokens",
        "loss",
        "beta2_loss",
    ]
    lines = [names, *[[_cell(name, row[name]) for name in names] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    print("\nWin rates are against the base model, on held-out prompts.")
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(name: str, value: Any) -> str:
    if name.endswith("_win_rate"):
        return f"{100 * value:.1f}%"
    return f"{value:.5g}" if isinstance(value, float) else json.dumps(value)

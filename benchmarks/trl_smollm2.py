"""One iteration as a user of vLLM and trl writes it: the peer that benchmarks/peer_smollm2.py measures.

    python benchmarks/trl_smollm2.py draw --recipe recipes/sppo/smollm2.yaml --model M --prompts train.jsonl \
        --output_dir runs/trl/pairs
    python benchmarks/trl_smollm2.py train --recipe recipes/sppo/smollm2.yaml --model M --loss sppo_hard \
        --pairs runs/trl/pairs/pairs.jsonl --output_dir runs/trl/sppo_hard

`draw` asks vLLM once for all responses, scores them, and keeps the best and the worst of each prompt. `train` is
DPOTrainer on these pairs. They are two commands, so that vLLM's memory is free before the training.
Of this project they use the settings and the ranker alone. They are for a CPU.
Reads   the model, the prompts ({"prompt": text} a line); the recipe, whose ranker is a function, module:name.
Writes  draw: <output_dir>/pairs.jsonl; train: the trained model into <output_dir>, and trainer_state.json.
Exit codes: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo.command.errors import UsageError, run_main
from sppo.recipe import Recipe, load_recipe

LOSSES = ("sppo_hard", "sigmoid")  # trl's own variant of SPPO, and DPO
# settings of ours that are not done here: with another value of one the two would not do the same
UNREAD = (
    "system_prompt chat_template_kwargs extra_responses ranker_temperature length_penalty select min_margin test_size "
    "keep_degenerate loss_type anchor reg label_smoothing schedule_epochs use_peft accumulate"
).split()

Prefer = Callable[[str, str, str], float]  # (prompt, first, second) -> a logit, above 0 where `first` is better


def read_recipe(path: Path, seed: int, dtype: str = "auto") -> Recipe:
    """The recipe, in that precision. Raises UsageError for one that this script would not do as run.sh does."""
    recipe, usual = load_recipe(path, {"seed": seed, "dtype": dtype}), Recipe()
    for key in UNREAD:
        if getattr(recipe, key) != getattr(usual, key):
            raise UsageError(f"{path}: {key}: benchmarks/trl_smollm2.py does not do it; leave it at its default")
    if recipe.ranker.count(":") != 1:
        raise UsageError(f"{path}: ranker: {recipe.ranker} is no function; write module:name")
    return recipe


def best_and_worst(prefer: Prefer, prompt: str, responses: list[str]) -> tuple[str, str] | None:
    """The response with the highest and that with the lowest mean preference over the K responses.

    Where the preference is a difference of two scores, as that of SmolLM2's instructions, this is the order of the
    scores. None for a prompt that run.sh leaves out too: all are equally good, or one of the two is blank.
    """
    scores = [sum(prefer(prompt, one, other) for other in responses) for one in responses]
    best, worst = (responses[scores.index(extreme(scores))] for extreme in (max, min))
    if max(scores) == min(scores) or not best.strip() or not worst.strip():
        return None
    return best, worst


def draw(model: Path, prompts: Path, recipe: Recipe, output_dir: Path) -> None:
    """K responses to each prompt, and pairs.jsonl of the best against the worst."""
    # by default the engine is another process, which leaves one core idle: of two that is half
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    module, name = recipe.ranker.split(":")
    prefer: Prefer = getattr(importlib.import_module(module), name)
    asked = [json.loads(line)["prompt"] for line in prompts.read_text(encoding="utf-8").splitlines()]
    llm = LLM(
        model=str(model),
        dtype="bfloat16" if recipe.dtype == "bfloat16" else "float32",
        seed=recipe.seed,
        enforce_eager=True,  # else it compiles the model before it draws
        gpu_memory_utilization=0.4,  # of the memory; the default of 0.92 is refused where less is free
    )
    sampling = SamplingParams(
        n=recipe.pairs, temperature=recipe.temperature, top_p=recipe.top_p, max_tokens=recipe.maxlen
    )
    # LLM.generate behind the model's chat template
    outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in asked], sampling)

    lines = []
    for prompt, output in zip(asked, outputs, strict=True):
        pair = best_and_worst(prefer, prompt, [one.text for one in output.outputs])
        if pair:
            sides = zip(("chosen", "rejected"), pair, strict=True)
            row = {side: [{"role": "assistant", "content": text}] for side, text in sides}
            lines.append(json.dumps({"prompt": [{"role": "user", "content": prompt}], **row}) + "\n")
    if not lines:
        raise SystemExit("no pair is left to train on: the ranker finds all responses to each prompt equally good")
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} pairs of {len(asked)} prompts")


def train(model: Path, pairs: Path, loss: str, recipe: Recipe, output_dir: Path) -> None:
    """trl's DPOTrainer on pairs.jsonl, with the recipe's settings."""
    import datasets
    import trl

    # in memory: a data set in the cache would bring the other loss's reference log-probs with it
    rows = datasets.Dataset.from_list([json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()])
    settings = trl.DPOConfig(
        output_dir=str(output_dir),
        loss_type=[loss],
        beta=recipe.beta,
        max_length=recipe.max_length,
        precompute_ref_log_probs=True,  # the faster way (docs/benchmarks.md)
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_ratio,
        optim=recipe.optim,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        num_train_epochs=recipe.num_train_epochs,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.global_batch_size // recipe.batch_size,
        gradient_checkpointing=recipe.gradient_checkpointing,
        logging_steps=recipe.logging_steps,
        seed=recipe.seed,
        use_cpu=True,
        bf16=recipe.dtype == "bfloat16",  # the weights stay in float32, as ours do
        save_strategy="no",
        report_to="none",
    )
    trainer = trl.DPOTrainer(str(model), args=settings, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    trainer.save_state()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("draw", "train"):
        command = commands.add_parser(name)
        for flag in ("recipe", "model", "output_dir"):
            command.add_argument(f"--{flag}", type=Path, required=True)
        command.add_argument("--seed", type=int, default=42, help="%(default)s")
        command.add_argument("--dtype", default="auto", help="of drawing and training, as in run.sh (%(default)s)")
        command.add_argument("--prompts" if name == "draw" else "--pairs", type=Path, required=True)
    command.add_argument("--loss", choices=LOSSES, required=True)
    args = parser.parse_args()
    recipe = read_recipe(args.recipe, args.seed, args.dtype)
    if args.command == "draw":
        draw(args.model, args.prompts, recipe, args.output_dir)
    else:
        train(args.model, args.pairs, args.loss, recipe, args.output_dir)


if __name__ == "__main__":
    run_main(main)

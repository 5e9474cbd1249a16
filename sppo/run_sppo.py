"""Train one iteration: $DATA -> $MODEL.

    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml --num_processes 8 \\
        sppo/run_sppo.py recipes/sppo/released.yaml --model=M --dataset=runs/x/iter1/data \\
        --output_dir=runs/x/iter1/model

Reads   the policy (Hub id or directory) and the data set (train.parquet, its directory, or a Hub data set).
Writes  --output_dir: weights, config, the policy's own tokenizer files, metrics.jsonl, a model card and the
        manifest. It appears when it is whole; until then everything is in <output_dir>.partial, from whose
        newest checkpoint a killed run goes on.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# As a script, Python puts sppo/ itself on the path, where our modules would shadow others' names.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sppo import chat, config  # noqa: E402
from sppo.config import Recipe  # noqa: E402
from sppo.errors import SPPOError, UsageError, run_main  # noqa: E402
from sppo.files import digest, read_json, sync_directory, write_json  # noqa: E402
from sppo.launch import die_with_parent  # noqa: E402
from sppo.manifest import Stage  # noqa: E402
from sppo.models import Policy, load_causal_lm, open_policy  # noqa: E402

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from sppo.data import TrainingSet
    from sppo.trainer import SPPOTrainer

KEYS = (
    "model model_revision seed loss_type beta learning_rate lr_scheduler_type warmup_ratio num_train_epochs "
    "schedule_epochs optim weight_decay max_grad_norm global_batch_size batch_size accumulate gradient_checkpointing "
    "max_prompt_length max_length attn_implementation logging_steps save_steps report_to prompts_revision "
    "chat_template_kwargs"
).split()
# what decides the result; the rest only decides where and how fast it is computed
IDENTITY = (
    "seed loss_type beta learning_rate lr_scheduler_type warmup_ratio num_train_epochs schedule_epochs optim "
    "weight_decay max_grad_norm max_prompt_length max_length attn_implementation chat_template_kwargs"
).split()


@dataclass
class Training:
    """A training as it was asked for, before anything heavy is loaded."""

    recipe: Recipe
    iteration: int
    overwrite: bool
    source: Policy
    dataset: Path
    output_dir: Path
    processes: int
    steps: int  # accumulation steps
    stage: Stage

    @property
    def work(self) -> Path:
        """Where everything is until the model is whole."""
        return self.output_dir.with_name(self.output_dir.name + ".partial")

    def is_done(self) -> bool:
        """Whether output_dir holds this very training's model. Raises SPPOError if it holds another's."""
        done = not self.overwrite and self.stage.is_done()
        if done:
            print(f"train: done: {self.output_dir}")
        return done


def main(argv: list[str] | None = None) -> None:
    training = prepare(argv, int(os.environ.get("WORLD_SIZE", 1)))
    if training.is_done():
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(training.work, ignore_errors=True)
        return
    train(training)


def prepare(argv: list[str] | None, processes: int) -> Training:
    """Read flags, recipe, model and data set's names; raise UsageError or SPPOError for what cannot work."""
    from sppo.data import dataset_file

    parser = config.make_parser(__doc__, KEYS)
    parser.add_argument("recipe_file", nargs="?", help="the recipe, as a first argument instead of --recipe")
    parser.add_argument("--dataset", required=True, help="train.parquet, a $DATA directory, or a data set on the Hub")
    parser.add_argument("--output_dir", required=True, type=Path, help="where the trained model appears")
    parser.add_argument("--iter", type=int, default=0, help="the iteration's number, for the model card")
    parser.add_argument("--overwrite", action="store_true", help="train again over another run's model")
    args, recipe = config.parse(parser, argv)
    if recipe.num_train_epochs <= 0:
        raise UsageError("--num_train_epochs must be above 0")
    if recipe.max_prompt_length >= recipe.max_length:
        raise UsageError("--max_prompt_length must be below --max_length: the response needs room")
    steps = accumulation(recipe, processes)
    source = open_policy(recipe.model, recipe.model_revision)
    path = dataset_file(args.dataset, recipe)
    occupied = args.output_dir.exists() and any(args.output_dir.iterdir())
    stage = Stage(
        "train",
        args.output_dir / "sppo_manifest.json",
        [args.output_dir] if occupied else [],
        inputs={"model": source.identity(), "dataset": digest(path)},
        settings={
            "global_batch_size": recipe.batch_size * steps * processes,
            **{k: getattr(recipe, k) for k in IDENTITY},
        },
    )
    return Training(recipe, args.iter, args.overwrite, source, path, args.output_dir, processes, steps, stage)


def accumulation(recipe: Recipe, processes: int) -> int:
    """Accumulation steps that keep the global batch. Raises UsageError where it does not come out even."""
    if recipe.accumulate:
        return recipe.accumulate
    steps, rest = divmod(recipe.global_batch_size, recipe.batch_size * processes)
    if rest or not steps:
        raise UsageError(
            f"global_batch_size {recipe.global_batch_size} is not a multiple of {processes} processes x batch_size "
            f"{recipe.batch_size}; change --batch_size or --global_batch_size"
        )
    return steps


def train(training: Training) -> None:
    """Train into output_dir, on every rank of an accelerate launch."""
    recipe, work, stage = training.recipe, training.work, training.stage
    checkpoint = _resume_point(stage, work, training.overwrite and os.environ.get("RANK", "0") == "0")
    trainer, data = _trainer(training)
    if trainer.is_world_process_zero():
        batch = f"{training.processes} x {recipe.batch_size} x {training.steps} pairs a step"
        print(f"train: {data.counts}; {batch}" + (f"; going on from {checkpoint}" if checkpoint else ""))
        write_json(work / "identity.json", stage.identity)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    from transformers import GenerationConfig

    trainer.model.generation_config = GenerationConfig()  # the source's own file is copied over it
    trainer.save_model(str(work / "final"))
    if trainer.is_world_process_zero():
        loss = result.training_loss
        metrics = {"iteration": training.iteration, "loss": loss, "beta2_loss": recipe.beta**2 * loss}
        _finish(training, metrics, data)
        print(f"train: {training.output_dir}: loss {loss:.6g}, beta^2 loss {metrics['beta2_loss']:.6g}")


def _resume_point(stage: Stage, work: Path, overwrite: bool) -> str | None:
    """The newest whole checkpoint of an earlier try at the same training, if there is one."""
    if overwrite:
        shutil.rmtree(work, ignore_errors=True)
    if not (work / "identity.json").exists():
        return None
    stage.refuse_if_different(read_json(work / "identity.json"))
    whole = [c for c in work.glob("checkpoint-*") if (c / "trainer_state.json").exists()]
    return str(max(whole, key=lambda c: int(c.name.rpartition("-")[2]))) if whole else None


def _trainer(training: Training) -> tuple[SPPOTrainer, TrainingSet]:
    import torch

    from sppo.data import load_training_set
    from sppo.trainer import SPPOTrainer, disable_dropout

    recipe, source, work = training.recipe, training.source, training.work
    tokenizer = source.tokenizer()
    data = load_training_set(training.dataset, tokenizer, source.stop_ids(tokenizer), recipe)
    args = _training_arguments(recipe, work, training.steps)
    if args.world_size != training.processes:
        raise SPPOError(
            f"{training.processes} processes were launched, {args.world_size} take part; check the accelerate config"
        )
    # after TrainingArguments: under ZeRO-3 the weights are then sharded as they load
    model = load_causal_lm(source, torch.float32, recipe.attn_implementation)
    disable_dropout(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return SPPOTrainer(model, args, recipe, data, pad, work / "reference_logps.safetensors"), data


def _training_arguments(recipe: Recipe, work: Path, steps: int) -> TrainingArguments:
    import torch
    from transformers import TrainingArguments

    gpu = torch.cuda.is_available()
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(work.parent / "logs" / "tensorboard"))
    return TrainingArguments(
        output_dir=str(work),
        use_cpu=not gpu,  # the accelerate config's use_cpu alone does nothing under DeepSpeed
        bf16=gpu,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=steps,
        num_train_epochs=recipe.num_train_epochs,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_ratio if recipe.warmup_ratio < 1 else 0,
        optim=recipe.optim,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=recipe.logging_steps,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        report_to=recipe.report_to,
        seed=recipe.seed,
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=gpu,
        eval_strategy="no",
    )


def _finish(training: Training, metrics: dict[str, Any], data: TrainingSet) -> None:
    """Complete the model in <work>/final and rename it to output_dir in one step."""
    source, work, stage = training.source, training.work, training.stage
    final = work / "final"
    for name in (*chat.TOKENIZER_FILES, "generation_config.json"):
        (final / name).unlink(missing_ok=True)
        origin = source.weights if name == "generation_config.json" else source.tokenizer_dir
        if (origin / name).exists():
            shutil.copyfile(origin / name, final / name)
    (final / "training_args.bin").unlink(missing_ok=True)  # a pickle
    shutil.copyfile(work / "metrics.jsonl", final / "metrics.jsonl")
    _model_card(training.recipe, final, metrics)
    stage.manifest = final / "sppo_manifest.json"
    stage.outputs = sorted(p for p in final.iterdir() if p.suffix in (".safetensors", ".json") and p != stage.manifest)
    stage.finish(data.counts, model=training.recipe.model, **metrics)
    if training.output_dir.exists():
        shutil.rmtree(training.output_dir)
    os.rename(final, training.output_dir)
    sync_directory(training.output_dir.parent)
    shutil.rmtree(work)


def _model_card(recipe: Recipe, final: Path, metrics: dict[str, Any]) -> None:
    base = recipe.model if "/" in recipe.model and not Path(recipe.model).exists() else Path(recipe.model).name
    head = f"---\nbase_model: {base}\nlibrary_name: transformers\ntags: [sppo, alignment]\n---\n\n" if base else ""
    lines = [f"| {k} | {getattr(recipe, k)} |" for k in ("beta", *[i for i in IDENTITY if i != "beta"])]
    text = (
        f"{head}# SPPO, iteration {metrics['iteration']}\n\nTrained from {base} with Self-Play Preference Optimization "
        f"(arXiv 2405.00675). Mean training loss {metrics['loss']:.6g}, beta^2 loss {metrics['beta2_loss']:.6g}.\n\n"
        "| setting | value |\n|---|---|\n" + "\n".join(lines) + "\n"
    )
    (final / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # a launcher that is killed must not leave its ranks training
        die_with_parent()
    run_main(main)

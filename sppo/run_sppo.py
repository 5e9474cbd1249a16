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
from pathlib import Path
from typing import TYPE_CHECKING, Any

# As a script, Python puts sppo/ itself on the path, where our modules would shadow others' names.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sppo import chat, config  # noqa: E402
from sppo.config import Recipe  # noqa: E402
from sppo.errors import SPPOError, UsageError, run_main  # noqa: E402
from sppo.files import digest, read_json, sync_directory, write_json  # noqa: E402
from sppo.launch import die_with_parent  # noqa: E402
from sppo.manifest import Stage, model_identity, resolve  # noqa: E402

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from sppo.data import TrainingSet
    from sppo.trainer import SPPOTrainer

KEYS = (
    "model model_revision seed loss_type beta learning_rate lr_scheduler_type warmup_ratio num_train_epochs "
    "schedule_epochs optim weight_decay max_grad_norm global_batch_size batch_size accumulate gradient_checkpointing "
    "max_prompt_length max_length attn_implementation logging_steps save_steps report_to prompts_revision"
).split()
# what decides the result; the rest only decides where and how fast it is computed
IDENTITY = (
    "seed loss_type beta learning_rate lr_scheduler_type warmup_ratio num_train_epochs schedule_epochs optim "
    "weight_decay max_grad_norm max_prompt_length max_length attn_implementation"
).split()


def main(argv: list[str] | None = None) -> None:
    parser = config.make_parser(__doc__, KEYS)
    parser.add_argument("recipe_file", nargs="?", help="the recipe, as a first argument instead of --recipe")
    parser.add_argument("--dataset", required=True, help="train.parquet, a $DATA directory, or a data set on the Hub")
    parser.add_argument("--output_dir", required=True, type=Path, help="where the trained model appears")
    parser.add_argument("--iter", type=int, default=0, help="the iteration's number, for the model card")
    parser.add_argument(
        "--overwrite", action="store_true", help="train again although output_dir holds another run's model"
    )
    args = parser.parse_args(argv)
    args.recipe = args.recipe or args.recipe_file
    given = {k: getattr(args, k) for k in KEYS if getattr(args, k) is not None}
    recipe = config.load_recipe(args.recipe, given)
    train(recipe, args.dataset, args.output_dir, args.iter, args.overwrite)


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


def train(recipe: Recipe, dataset: str, output_dir: Path, iteration: int, overwrite: bool) -> None:
    """Train `recipe.model` on `dataset` into output_dir, on every rank of an accelerate launch."""
    from sppo.data import dataset_file, load_training_set

    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if recipe.num_train_epochs <= 0:
        raise UsageError("--num_train_epochs must be above 0")
    if recipe.max_prompt_length >= recipe.max_length:
        raise UsageError("--max_prompt_length must be below --max_length: the response needs room")
    steps = accumulation(recipe, processes)
    source = resolve(recipe.model, recipe.model_revision)
    path = dataset_file(dataset, recipe)
    work = output_dir.with_name(output_dir.name + ".partial")
    stage = Stage(
        "train",
        output_dir / "sppo_manifest.json",
        [output_dir] if output_dir.exists() and any(output_dir.iterdir()) else [],
        inputs={"model": model_identity(source), "dataset": digest(path)},
        settings={
            "global_batch_size": recipe.batch_size * steps * processes,
            **{k: getattr(recipe, k) for k in IDENTITY},
        },
    )
    if not overwrite and stage.is_done():
        print(f"train: done: {output_dir}")
        if rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        return
    checkpoint = _resume_point(stage, work, overwrite and rank == 0)
    trainer, data = _trainer(recipe, source, path, work, steps, processes, load_training_set)
    if trainer.is_world_process_zero():
        print(
            f"train: {data.counts}; {processes} x {recipe.batch_size} x {steps} pairs a step"
            + (f"; going on from {checkpoint}" if checkpoint else "")
        )
        write_json(work / "identity.json", stage.identity)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    final = work / "final"
    from transformers import GenerationConfig

    trainer.model.generation_config = GenerationConfig()  # the source's own file is copied below
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        metrics = {"loss": result.training_loss, "beta2_loss": recipe.beta**2 * result.training_loss}
        _finish(stage, recipe, source, final, work, output_dir, {"iteration": iteration, **metrics}, data)
        print(f"train: {output_dir}: loss {metrics['loss']:.6g}, beta^2 loss {metrics['beta2_loss']:.6g}")


def _resume_point(stage: Stage, work: Path, overwrite: bool) -> str | None:
    """The newest whole checkpoint of an earlier try at the same training, if there is one."""
    if overwrite:
        shutil.rmtree(work, ignore_errors=True)
    if not (work / "identity.json").exists():
        return None
    stage.refuse_if_different(read_json(work / "identity.json"))
    whole = [c for c in work.glob("checkpoint-*") if (c / "trainer_state.json").exists()]
    return str(max(whole, key=lambda c: int(c.name.rpartition("-")[2]))) if whole else None


def _trainer(
    recipe: Recipe, source: Path, path: Path, work: Path, steps: int, processes: int, load: Any
) -> tuple[SPPOTrainer, TrainingSet]:
    import torch

    from sppo.engines import load_causal_lm
    from sppo.trainer import SPPOTrainer, disable_dropout

    tokenizer = chat.load_tokenizer(source)
    data = load(path, tokenizer, chat.stop_token_ids(source, tokenizer), recipe)
    args = _training_arguments(recipe, work, steps)
    if args.world_size != processes:
        raise SPPOError(
            f"{processes} processes were launched, {args.world_size} take part; check the accelerate config"
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


def _finish(
    stage: Stage,
    recipe: Recipe,
    source: Path,
    final: Path,
    work: Path,
    output_dir: Path,
    metrics: dict[str, Any],
    data: TrainingSet,
) -> None:
    """Complete the model in `final` and rename it to output_dir in one step."""
    for name in (*chat.TOKENIZER_FILES, "generation_config.json"):
        (final / name).unlink(missing_ok=True)
        if (source / name).exists():
            shutil.copyfile(source / name, final / name)
    (final / "training_args.bin").unlink(missing_ok=True)  # a pickle
    shutil.copyfile(work / "metrics.jsonl", final / "metrics.jsonl")
    _model_card(recipe, final, metrics)
    stage.manifest = final / "sppo_manifest.json"
    stage.outputs = sorted(p for p in final.iterdir() if p.suffix in (".safetensors", ".json") and p != stage.manifest)
    stage.finish(data.counts, model=recipe.model, **metrics)
    if output_dir.exists():
        shutil.rmtree(output_dir)
    os.rename(final, output_dir)
    sync_directory(output_dir.parent)
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

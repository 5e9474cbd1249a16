"""Train one iteration: $DATA -> $MODEL.

    accelerate launch --config_file recipes/accelerate_configs/zero3.yaml --num_processes 8 \\
        sppo/run_sppo.py recipes/sppo/released.yaml --model=M --dataset=runs/x/iter1/data \\
        --output_dir=runs/x/iter1/model

Reads   the policy (Hub id or directory) and the data set (train.parquet, its directory, or a Hub data set).
Writes  --output_dir: weights (with --use_peft an adapter), config, the policy's own tokenizer files, metrics.jsonl,
        a model card and the manifest. It appears when it is whole; until then everything is in <output_dir>.partial,
        from whose newest checkpoint a killed run goes on. The reference's log-probs are kept in reference/ beside
        the data set, for any later run with the same policy and data.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
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
from sppo.card import write_card  # noqa: E402
from sppo.checkpoints import only_plain_values, refuse_another, resume_point, tidy, told_when_full  # noqa: E402
from sppo.config import Recipe  # noqa: E402
from sppo.errors import DONE, SPPOError, UsageError, die_with_parent, leave, run_main  # noqa: E402
from sppo.files import digest, read_json, sync_directory, write_json  # noqa: E402
from sppo.manifest import Stage  # noqa: E402
from sppo.models import Policy, add_adapter, load_causal_lm, load_config, policy_of, public_name  # noqa: E402

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from sppo.data import TrainingSet
    from sppo.trainer import SPPOTrainer

# what decides the result; the rest only decides where and how fast it is computed
IDENTITY = (
    "seed loss_type beta label_smoothing learning_rate lr_scheduler_type warmup_ratio num_train_epochs schedule_epochs "
    "optim weight_decay max_grad_norm max_prompt_length max_length attn_implementation chat_template_kwargs use_peft "
    "lora_r lora_alpha lora_target_modules load_in_4bit merge_adapter"
).split()
KEYS = [
    *"model model_revision trust_remote_code prompts_revision global_batch_size batch_size accumulate".split(),
    *"gradient_checkpointing logging_steps save_steps report_to".split(),
    *IDENTITY,
]


@dataclass
class Training:
    """A training as it was asked for, before anything heavy is loaded."""

    recipe: Recipe
    iteration: int
    overwrite: bool
    source: Policy
    dataset: Path
    data_name: str  # as the model card says it
    output_dir: Path
    processes: int
    steps: int  # accumulation steps
    stage: Stage

    @property
    def work(self) -> Path:
        """Where everything is until the model is whole."""
        return self.output_dir.with_name(self.output_dir.name + ".partial")

    def is_done(self) -> bool:
        """Whether output_dir holds this very training's model. Raises SPPOError if it, or what a killed try left, holds
        another's."""
        if self.overwrite:
            return False
        done = self.stage.is_done()
        if done:
            print(f"train: done: {self.output_dir}")
        else:
            refuse_another(self.work, self.stage)
        return done


def main(argv: list[str] | None = None) -> None:
    training = prepare(argv, int(os.environ.get("WORLD_SIZE", 1)))
    if training.is_done():
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(training.work, ignore_errors=True)
        return
    train(training)
    if training.processes > 1 and "WORLD_SIZE" in os.environ:
        leave(DONE)  # in the interpreter's own end gloo's threads may abort a rank that has done its work


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
    check(recipe)
    steps = accumulation(recipe, processes)
    source = policy_of(recipe)
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
    name = args.dataset if args.dataset.count("/") == 1 and not Path(args.dataset).exists() else path.name
    return Training(recipe, args.iter, args.overwrite, source, path, name, args.output_dir, processes, steps, stage)


def check(recipe: Recipe, gpu: bool | None = None) -> None:
    """Raise UsageError for settings that contradict each other or that this machine cannot do.

    `gpu`: whether there will be one; None asks PyTorch.
    """
    if recipe.num_train_epochs <= 0:
        raise UsageError("--num_train_epochs must be above 0")
    if recipe.max_prompt_length >= recipe.max_length:
        raise UsageError("--max_prompt_length must be below --max_length: the response needs room")
    if recipe.label_smoothing and recipe.loss_type != "sigmoid":
        raise UsageError(f"--label_smoothing is for --loss_type sigmoid; {recipe.loss_type} has win rates or none")
    for flag in ("load_in_4bit", "merge_adapter"):
        if getattr(recipe, flag) and not recipe.use_peft:
            raise UsageError(f"--{flag} goes with --use_peft")
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    for flag, known in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        name, names = getattr(recipe, flag), [member.value for member in known]
        if name not in names:
            hint = config.nearest(name, names) or f"; one of {', '.join(names)}"
            raise UsageError(f"--{flag} {name}: transformers does not know it{hint}")
    if recipe.load_in_4bit:
        import torch

        gpu = torch.cuda.is_available() if gpu is None else gpu
        if importlib.util.find_spec("bitsandbytes") is None or not gpu:
            raise UsageError("--load_in_4bit needs a GPU and bitsandbytes (pip install bitsandbytes); without it: LoRA")
    if recipe.report_to != "none" and importlib.util.find_spec(recipe.report_to) is None:
        raise UsageError(f"--report_to {recipe.report_to}: not installed; pip install {recipe.report_to}")
    if recipe.report_to == "wandb" and not _wandb_answers():
        raise UsageError(
            "--report_to wandb: not logged in; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
        )


def _wandb_answers() -> bool:
    """Whether wandb starts without asking for a key, which would leave the other ranks waiting."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8")


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
    import torch

    recipe, work, stage = training.recipe, training.work, training.stage
    first = os.environ.get("RANK", "0") == "0"
    if training.overwrite and first:
        shutil.rmtree(work, ignore_errors=True)
    checkpoint = None if training.overwrite else resume_point(work)
    if first:
        tidy(work, checkpoint)
    trainer, data = _trainer(training)
    if first:
        batch = f"{training.processes} x {recipe.batch_size} x {training.steps} rows a step"
        clipping = f"gradients clipped at {recipe.max_grad_norm:g}" if recipe.max_grad_norm else "no gradient clipping"
        print(f"train: {data.counts}; {batch}; {clipping}" + (f"; going on from {checkpoint}" if checkpoint else ""))
        write_json(work / "identity.json", stage.identity)
    if checkpoint:
        only_plain_values(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _save(trainer, training)
    if torch.distributed.is_initialized():
        # a rank that leaves while others still hold its connections may crash on its way out
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if first:
        metrics = {"iteration": training.iteration, **_summary(work / "metrics.jsonl")}
        _finish(training, metrics, data)
        loss, scaled = metrics["loss"], metrics["beta2_loss"]
        print(f"train: {training.output_dir}: loss {loss:.6g}, beta^2 loss {scaled:.6g}")


def _summary(metrics: Path) -> dict[str, float]:
    """Mean loss over all steps, and the last line's other metrics, whatever tries the run took."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] - before for line, before in zip(lines, [0, *(x["step"] for x in lines)], strict=False)]
    mean = {
        name: sum(line[name] * n for line, n in zip(lines, steps, strict=True)) / sum(steps)
        for name in ("loss", "beta2_loss")
    }
    return {**mean, **{k: v for k, v in lines[-1].items() if k.startswith(("rewards/", "logps/"))}}


def _trainer(training: Training) -> tuple[SPPOTrainer, TrainingSet]:
    import torch
    import transformers

    from sppo.data import load_training_set
    from sppo.logps import add_lean_forward
    from sppo.reference import ReferenceTable, reference_key
    from sppo.trainer import SPPOTrainer, disable_dropout

    recipe, source, work = training.recipe, training.source, training.work
    tokenizer = source.tokenizer()
    data = load_training_set(training.dataset, tokenizer, source.stop_ids(tokenizer), recipe)
    source.check_tokens(max(int(side.max()) for row in (*data.prompts, *data.responses) for side in row))
    args = _training_arguments(recipe, work, training.steps)
    if args.world_size != training.processes:
        raise SPPOError(
            f"{training.processes} processes were launched, {args.world_size} take part; check the accelerate config"
        )
    # after TrainingArguments: under ZeRO-3 the weights are then sharded as they load
    model = load_causal_lm(
        source, torch.float32, recipe.attn_implementation, not recipe.use_peft, _quantization(recipe.load_in_4bit)
    )
    lean = add_lean_forward(model)
    if recipe.load_in_4bit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if recipe.use_peft:
        transformers.set_seed(recipe.seed)  # a new adapter begins at random
        model = add_adapter(model, source, recipe.lora_r, recipe.lora_alpha, recipe.lora_target_modules)
    disable_dropout(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    precision = "4bit" if recipe.load_in_4bit else "bf16" if args.bf16 else "float32"
    how = {"precision": precision, "attention": recipe.attn_implementation, "transformers": transformers.__version__}
    key = reference_key(source.identity(), data, **how)
    table = ReferenceTable(key, (training.dataset.parent / "reference", work / "reference"))
    return SPPOTrainer(model, args, recipe, data, pad, table, lean), data


def _quantization(load_in_4bit: bool) -> Any:
    """QLoRA's 4-bit NormalFloat with double quantisation (arXiv 2305.14314)."""
    if not load_in_4bit:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _training_arguments(recipe: Recipe, work: Path, steps: int) -> TrainingArguments:
    import torch
    from transformers import TrainingArguments

    gpu = torch.cuda.is_available()
    if not gpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        # communication through shared memory would be compiled for a minute, and needs a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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
        report_to=recipe.report_to,
        seed=recipe.seed,
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=gpu,
        eval_strategy="no",
    )


def _save(trainer: SPPOTrainer, training: Training) -> None:
    """The weights into <work>/final, by all ranks: in the policy's own precision, or the adapter alone."""
    from transformers import GenerationConfig

    if not training.recipe.use_peft:
        trainer.model.generation_config = GenerationConfig()  # the source's own file is copied over it
        dtype = load_config(training.source).dtype
        if dtype is not None and not trainer.is_deepspeed_enabled:
            trainer.model.to(dtype)  # from the master weights; a policy in bfloat16 stays one
    with told_when_full():
        trainer.save_model(str(training.work / "final"))


def _finish(training: Training, metrics: dict[str, Any], data: TrainingSet) -> None:
    """Complete the model in <work>/final and rename it to output_dir in one step."""
    source, work, stage, model = training.source, training.work, training.stage, training.recipe.model
    final = work / "final"
    (final / "training_args.bin").unlink(missing_ok=True)  # a pickle
    if training.recipe.use_peft:
        _name_base(training, final / "adapter_config.json")
        if training.recipe.merge_adapter:
            _merge(source, final)
    else:
        _copy(source.weights, final, ("generation_config.json",))
    _copy(source.tokenizer_dir, final, chat.TOKENIZER_FILES)
    if source.remote_code:
        _copy(source.weights, final, tuple(p.name for p in source.weights.glob("*.py")))
    shutil.copyfile(work / "metrics.jsonl", final / "metrics.jsonl")
    write_card(final, training.recipe, training.data_name, stage.inputs["dataset"], metrics, data.counts, IDENTITY)
    stage.manifest = final / "sppo_manifest.json"
    stage.outputs = sorted(p for p in final.iterdir() if p.suffix in (".safetensors", ".json") and p != stage.manifest)
    stage.finish(data.counts, model=model, model_name=public_name(model), **metrics)
    if training.output_dir.exists():
        shutil.rmtree(training.output_dir)
    os.rename(final, training.output_dir)
    sync_directory(training.output_dir.parent)
    shutil.rmtree(work)


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Files as they are in `source`, and none of them in `target` that are not there."""
    for name in names:
        (target / name).unlink(missing_ok=True)
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _name_base(training: Training, path: Path) -> None:
    """Let the adapter's config name its base so that it is found again: a Hub id, or a whole path."""
    config_json = read_json(path)
    if training.source.adapter is not None:
        earlier = read_json(training.source.adapter / "adapter_config.json")
        config_json["base_model_name_or_path"] = earlier["base_model_name_or_path"]
        config_json["revision"] = earlier.get("revision")
    elif Path(training.recipe.model).expanduser().is_dir():
        config_json["base_model_name_or_path"] = str(training.source.weights.resolve())
    else:
        config_json["base_model_name_or_path"] = training.recipe.model
        config_json["revision"] = training.recipe.model_revision or None
    write_json(path, config_json)


def _merge(source: Policy, final: Path) -> None:
    """<final>/merged: a model of its own, the adapter added to the base in float32, in the base's precision."""
    import torch

    merged = load_causal_lm(dataclasses.replace(source, adapter=final), torch.float32)
    merged.to(load_config(source).dtype or torch.float32).save_pretrained(final / "merged")
    _copy(source.weights, final / "merged", ("generation_config.json",))
    _copy(source.tokenizer_dir, final / "merged", chat.TOKENIZER_FILES)


if __name__ == "__main__":
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & set(
        os.environ
    ):  # a launcher that is killed must not leave its ranks training
        die_with_parent()
    run_main(main)

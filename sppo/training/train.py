"""The training itself, on every rank: model, data and reference put together, trained, and saved."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from sppo.command.errors import INTERRUPTED, SPPOError, leave
from sppo.command.importing import TRAINER, import_networks
from sppo.command.stopping import heard
from sppo.models.loading import add_adapter, load_causal_lm, load_config
from sppo.models.miniature import miniature_of, refuse_not_causal
from sppo.recipe import Recipe
from sppo.store.directories import clear
from sppo.store.files import read_json, write_json
from sppo.training.checkpoints import (
    check_parts,
    disk_full_as_os_error,
    is_work_of,
    keep_to,
    only_plain_values,
    resume_point,
    tidy,
    under_deepspeed,
)
from sppo.training.network import disable_noise, lora_and_quantization, lora_for, refuse_untrainable, unsharded
from sppo.training.save import finish
from sppo.training.settings import Training, check_machine, is_first_rank

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import TrainingArguments

    from sppo.training.trainer import SPPOTrainer


def train(training: Training) -> None:
    """Train into output_dir, on every rank of an accelerate launch."""
    import_networks(TRAINER)
    from sppo.training.ranks import Stopped, broadcast_checkpoint
    from sppo.training.read_back import logps_of

    check_machine(training.recipe)
    is_first = is_first_rank()
    # rank 0 decides for all: a shared disk may not yet show the others what it shows this one
    checkpoint = _prepare_work(training) if is_first else None
    with heard():
        trainer = make_trainer(training, checkpoint)
    data = trainer.batches.data
    checkpoint = broadcast_checkpoint(trainer.accelerator, training.work, checkpoint)
    if is_first:
        print(f"train: {_plan(training, trainer, checkpoint)}")
        if not training.recipe.train_thoughts and not data.counts.get("responses_with_a_thought"):
            print("train: warning: --train_thoughts false, and no response has a thought: each is trained on whole")
        write_json(training.work / "identity.json", training.stage.identity)
    if checkpoint:
        only_plain_values(checkpoint)

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Stopped:
        trainer.is_stopped = True
    logps = None
    if not trainer.is_stopped:
        trainer.refuse_broken_weights()
        if not training.recipe.use_peft:
            logps = logps_of(trainer.model_wrapped, training.source, trainer.args.device)
        _save(trainer, training)
    _close_connections()

    if trainer.is_stopped:
        if is_first:
            step = trainer.state.global_step
            kept = f"saved at step {step}" if step else "the log-probs that were computed are kept"
            print(f"train: stopped, as asked; {kept}", flush=True)
        leave(INTERRUPTED)
    if is_first:
        metrics = {"iteration": training.recipe.iteration, **_summary(training.work / "metrics.jsonl")}
        metrics["agreement"] = trainer.agreement
        with unsharded(trainer.args.deepspeed_plugin):  # this rank alone loads a network here
            finish(training, metrics, data, logps, trainer.args.bf16)
        loss, scaled = metrics["loss"], metrics["beta2_loss"]
        print(f"train: {training.output_dir}: loss {loss:.6g}, beta^2 loss {scaled:.6g}")


def _prepare_work(training: Training) -> Path | None:
    """Remove what this training cannot use, and return the checkpoint that it goes on from, if there is one."""
    if training.overwrite and not is_work_of(training.work, training.stage):
        clear(training.work)
    checkpoint = resume_point(training.work)
    if checkpoint:
        check_parts(checkpoint, training.processes)
    tidy(training.work, checkpoint)
    return checkpoint


def _plan(training: Training, trainer: SPPOTrainer, checkpoint: Path | None) -> str:
    """What is trained on and how, and what the first step must show, as a line for the log."""
    recipe = training.recipe
    batch = f"{training.processes} x {recipe.batch_size} x {training.steps} rows a step"
    clipping = f"gradients clipped at {recipe.max_grad_norm:g}" if recipe.max_grad_norm else "no gradient clipping"
    begins = f"; going on from {checkpoint}" if checkpoint else ""
    if not checkpoint and not training.anchor:  # with an anchor it is not known yet
        begins = f"; {trainer.first_loss().described(recipe.beta)}"
    return f"{trainer.batches.data.counts}; {batch}; {clipping}{begins}"


def _close_connections() -> None:
    """Close the ranks' connections all together: when one leaves earlier, another may crash."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _summary(metrics: Path) -> dict[str, float]:
    """Mean loss over all steps, of all tries, and the other metrics of the last line."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    before = [0, *(line["step"] for line in lines[:-1])]
    steps = [line["step"] - start for line, start in zip(lines, before, strict=True)]  # that each line is the mean of
    mean = {}
    for name in ("loss", "beta2_loss"):
        mean[name] = sum(line[name] * n for line, n in zip(lines, steps, strict=True)) / sum(steps)
    return {**mean, **{k: v for k, v in lines[-1].items() if k.startswith(("rewards/", "logps/", "divergence"))}}


def make_trainer(training: Training, checkpoint: Path | None = None) -> SPPOTrainer:
    """The trainer with model, data and reference table, ready to train. checkpoint: what it goes on from."""
    import torch
    import transformers

    from sppo.training.data import load_training_set
    from sppo.training.reference import Anchor, LogProbTable, reference_key
    from sppo.training.trainer import SPPOTrainer
    from sppo.training.trial import has_unused_weights

    recipe, source, work = training.recipe, training.source, training.work
    refuse_untrainable(recipe, source)
    small = miniature_of(source)
    if small is not None:
        refuse_not_causal(small)

    # the data
    tokenizer = source.tokenizer()
    stop_ids = source.stop_ids(tokenizer)
    data = load_training_set(training.dataset, tokenizer, stop_ids, recipe)
    highest = max(int(ids.max()) for row in (*data.prompts, *data.responses) for ids in row)
    for policy in filter(None, (source, training.anchor)):
        policy.check_tokens(highest)
    # padding is behind a sequence, where no attention looks, so any token will do; a tokenizer's own may have no row in
    # the embedding (added, and never resized)
    pad_id = min(stop_ids)

    # the network; what is trained is in float32, and a base that is not trained stays as stored under bfloat16 autocast
    args = _training_arguments(recipe, work, training.steps)
    if args.world_size != training.processes:
        raise SPPOError(
            f"{training.processes} processes were launched, {args.world_size} take part; check the accelerate config"
        )
    if args.world_size > 1 and args.deepspeed_plugin is None:
        args.ddp_find_unused_parameters = has_unused_weights(small) or None  # None: the Trainer's own choice
    dtype = "auto" if args.bf16 and recipe.use_peft else torch.float32
    precision = "4bit" if recipe.load_in_4bit else f"bf16 of {dtype}" if args.bf16 else "float32"
    how = {"precision": precision, "attention": recipe.attn_implementation, "transformers": transformers.__version__}
    if args.bf16 and under_deepspeed():
        how["engine"] = "deepspeed"  # all in bfloat16, where autocast keeps sums in float32
    if is_first_rank():
        keep_to(work, how, checkpoint)
    model, is_lean = _network(training, args, dtype, small)

    # where the log-probs of the reference and of the anchor are kept, by what decides them
    homes = (training.dataset.parent / "reference", work / "reference")
    table = LogProbTable(reference_key(source.identity(), data, **how), homes, "reference")
    anchor = None
    if training.anchor:
        anchor_table = LogProbTable(reference_key(training.anchor.identity(), data, **how), homes, "anchor")
        anchor = Anchor(
            policy=training.anchor,
            table=anchor_table,
            dtype=dtype,
            attention=recipe.attn_implementation,
            merge=not recipe.use_peft,
        )
    return SPPOTrainer(model, args, recipe, data, pad_id, table, is_lean, anchor)


def _network(training: Training, args: TrainingArguments, dtype: Any, small: Any | None) -> tuple[Any, bool]:
    """The network to train, and whether it has the forward of logps.add_lean_forward.

    Under ZeRO-3 the weights are sharded as they load, because TrainingArguments are there already. An adapter is
    merged into whole weights, so each rank holds all of them until the Trainer shards them. small: its miniature.
    """
    import transformers

    from sppo.training.logps import add_lean_forward

    recipe, source = training.recipe, training.source
    quantization = lora_and_quantization(recipe)[1]
    is_merged = source.adapter is not None and not recipe.use_peft
    with unsharded(args.deepspeed_plugin) if is_merged else nullcontext():
        model = load_causal_lm(source, dtype, recipe.attn_implementation, not recipe.use_peft, quantization)
    if is_merged:
        model.requires_grad_(True)  # peft freezes the base of an adapter
    is_lean = add_lean_forward(model)
    if recipe.load_in_4bit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if recipe.use_peft:
        lora = None
        if source.adapter is None:
            lora = lora_for(recipe, small, model)
            for begun in training.work.glob("checkpoint-*/adapter_config.json"):  # goes on with the same layers
                lora.exclude_modules = read_json(begun).get("exclude_modules")
        transformers.set_seed(recipe.seed)  # a new adapter begins at random
        model = add_adapter(model, source, lora)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise SPPOError(f"model {source.weights}: all its weights are frozen, so there is nothing to train")
    disable_noise(model)
    return model, is_lean


def _training_arguments(recipe: Recipe, work: Path, steps: int) -> TrainingArguments:
    import torch
    from transformers import TrainingArguments

    gpu = torch.cuda.is_available()
    if not gpu and under_deepspeed():
        import deepspeed.ops

        # communication through shared memory would be compiled for a minute, and needs a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(work.parent / "logs" / "tensorboard"))
    return TrainingArguments(
        output_dir=str(work),
        use_cpu=not gpu,  # the accelerate config's use_cpu alone does nothing under DeepSpeed
        bf16=gpu
        or os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",  # on a CPU where the accelerate config says so
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
        logging_nan_inf_filter=False,  # it would show another number for a loss that is not finite, and wait for each
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
    with disk_full_as_os_error():
        trainer.save_model(str(training.work / "final"))

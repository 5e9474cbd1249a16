"""The SPPO trainer: transformers' Trainer with the reference as a table and the paper's loss.

A subclass of transformers.Trainer and not of trl.DPOTrainer: the loss, the columns, the collator and the truncation
would all have to be replaced there, and its cached reference log-probs do not notice new weights under an old path.
Our own loop would have to bring DeepSpeed, DDP, LoRA and checkpoints with it, which the Trainer has; what is
overridden here are its hooks for the loss, the loader, the schedule, the log and the checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sppo.command.errors import SPPOError
from sppo.command.stopping import may_stop, stop_asked
from sppo.method.loss import anchored_loss, preference_loss, sppo_all_loss
from sppo.recipe import Recipe
from sppo.store.directories import delete
from sppo.training.checkpoints import seal, told_when_full
from sppo.training.data import Batches, Place, StepBatches, TrainingSet
from sppo.training.first_step import FirstStep
from sppo.training.logps import CHUNK_TOKENS, response_logps
from sppo.training.passes import Anchor, find_anchor, find_reference
from sppo.training.reference import ReferenceTable, agreement, describe

# groups by length in which a micro-batch's responses go through the network; a GPU waits for smaller ones
_PARTS, _PART_TOKENS = 4, 1024
METRICS = (
    "rewards/chosen rewards/rejected rewards/accuracies rewards/margins rewards/chosen_target rewards/rejected_target "
    "logps/chosen logps/rejected"
).split()


class SPPOTrainer(Trainer):
    """Trains a policy on a TrainingSet. `lean`: whether the model has the forward of logps.add_lean_forward."""

    # compute_loss gives a micro-batch's share of its step; the Trainer divides it by the accumulation steps
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        recipe: Recipe,
        data: TrainingSet,
        pad_id: int,
        table: ReferenceTable,
        lean: bool = True,
        anchor: Anchor | None = None,
    ) -> None:
        self.recipe, self.table, self.lean, self.anchor = recipe, table, lean, anchor
        self.pull: torch.Tensor | None = None  # (S,): see loss.anchored_loss
        # the same on all ranks: see logps.py
        self.chunks = -(-recipe.batch_size * data.most_response_tokens() // CHUNK_TOKENS)
        self.reference: torch.Tensor | None = None  # (S,): log pi_t of every response
        self.agreement: dict[str, float] = {}  # see reference.agreement
        self.first_step: FirstStep | None = None  # while that is made
        self.is_stopped = False  # before its end, because somebody asked for it
        super().__init__(
            model=model,
            args=args,
            train_dataset=data,
            data_collator=partial(data.batch, pad_id=pad_id),
            callbacks=[_Flow(self)],
        )
        self._forget_metrics()
        deepspeed = self.accelerator.state.deepspeed_plugin
        if deepspeed is not None:
            # with the optimiser offloaded, DeepSpeed would put its own Adam in the place of any optimiser
            deepspeed.deepspeed_config.setdefault("zero_force_ds_cpu_optimizer", False)
        # weights that are spread over the ranks would be gathered again for each part
        spread = self.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3)
        self.parts = 1 if spread else _PARTS
        self.data_collator = partial(data.batch, pad_id=pad_id, parts=self.parts, part_tokens=_PART_TOKENS)

    def get_train_dataloader(self) -> Batches:
        """Every rank's own batches; no other sampler shares them out or repeats rows to come out even."""
        batches = StepBatches(
            self.train_dataset.lengths(),
            self.args.per_device_train_batch_size,
            self.args.gradient_accumulation_steps,
            self.args.seed,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            group=self.recipe.loss_type != "kto_pair",
        )
        pin = self.args.dataloader_pin_memory
        return Batches(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator, pin_memory=pin)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule is laid out over schedule_epochs, wherever training stops.

        A warm-up starts at a rate of 0, so a training of one step would change nothing: it has no warm-up.
        """
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        horizon = self.recipe.schedule_epochs or self.recipe.num_train_epochs
        steps = round(num_training_steps * horizon / self.recipe.num_train_epochs)
        if self.recipe.warmup_ratio == 1 and num_training_steps > 1:
            self.args.warmup_steps = steps  # transformers reads 1 as one step
        return super().create_scheduler(steps, optimizer)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A micro-batch's share of its step's mean loss (see data.batch); its metrics wait for the next log line.

        Averaged over accumulation steps and ranks, which is what follows, the shares are the mean over the step's
        rows, however they were dealt.
        """
        data, beta, rows = self.train_dataset, self.recipe.beta, inputs["rows"]
        logps = self.logps(model, inputs, self.lean)  # (S,)
        ratios = logps - self.reference.to(logps.device)[inputs["sequence"]]
        if self.first_step:
            self.first_step.note(logps, ratios, inputs)
        pair = inputs["pair"][:rows]  # (B, 2)
        a, b = ratios[pair].unbind(1)
        p, p_win, p_lose = data.win_rates.to(logps.device)[inputs["index"][:rows]].unbind(1)
        pull = None if self.pull is None else self.pull.to(logps.device)[inputs["sequence"]]
        if self.recipe.loss_type == "sppo_all":
            rates = data.sequence_rates.to(logps.device)[inputs["sequence"]]
            losses = sppo_all_loss(ratios, rates, inputs["row"], len(inputs["index"]), beta, pull)[:rows]
        elif pull is not None:
            losses = anchored_loss(a, b, beta, p_win, p_lose, *pull[pair].unbind(1))
        else:
            losses = preference_loss(self.recipe.loss_type, a, b, beta, p, p_win, p_lose, self.recipe.label_smoothing)
        if self.recipe.loss_type == "kto_pair":
            losses = losses.view(2, -1).mean(0)
        with torch.no_grad():
            chosen, rejected = logps[pair].unbind(1)
            targets = (p_win - 0.5).sum(), (p_lose - 0.5).sum()  # what SPPO moves beta * a and beta * b towards
            rewards = (beta * a).sum(), (beta * b).sum(), (a > b).sum(), (beta * (a - b)).sum()
            self._sums += torch.stack([*rewards, *targets, chosen.sum(), rejected.sum()]).double().to(self._sums.device)
            self._rows += rows
            self._tokens += inputs["attention_mask"].sum()
        micro_batches = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return losses.sum() * (micro_batches / inputs["step_rows"])

    def logps(self, model: Any, inputs: dict[str, Any], lean: bool) -> torch.Tensor:
        """(S,): log-probability of each of the batch's responses."""
        ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], inputs["positions"]
        if lean:
            split = {"runs": inputs["runs"], "widths": inputs["widths"]}
            return model(input_ids=ids, positions=positions, chunks=self.chunks, **split)
        return response_logps(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, ids, positions)

    def _forget_metrics(self) -> None:
        self._sums = torch.zeros(len(METRICS), dtype=torch.float64, device=self.args.device)
        self._rows = 0
        self._tokens = torch.zeros((), dtype=torch.long, device=self.args.device)
        self._since = time.monotonic()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last line, averaged over all ranks; keep every line in metrics.jsonl."""
        training = "loss" in logs
        if training:
            local = torch.tensor([self._rows, self._tokens], dtype=torch.float64, device=self._sums.device)
            *sums, rows, tokens = self.accelerator.reduce(torch.cat([self._sums, local]), "sum").tolist()
            logs["beta2_loss"] = self.recipe.beta**2 * logs["loss"]
            means = {name: total / rows for name, total in zip(METRICS, sums, strict=True)}
            if math.isnan(means["rewards/chosen_target"]):  # pairs without win rates have none
                means = {name: mean for name, mean in means.items() if not name.endswith("_target")}
            logs.update(means)
            logs["tokens_per_second"] = round(tokens / (time.monotonic() - self._since), 1)
            done = self.state.global_step - self._first_step
            pace = (time.monotonic() - self._began) / done
            logs["seconds_left"] = round(pace * (self.state.max_steps - self.state.global_step), 1)
            self._forget_metrics()
            if not math.isfinite(logs["loss"]):
                raise SPPOError(self._diverged(f"the loss is {logs['loss']}"))
        super().log(logs, start_time)
        if training and self.is_world_process_zero():
            with open(Path(self.args.output_dir) / "metrics.jsonl", "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": self.state.global_step, **logs}) + "\n")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint; the older ones are deleted only when every rank's part is on the disk."""
        self.refuse_broken_weights()  # they would replace a checkpoint that is good
        with told_when_full():
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            here = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            seal(here)
            for older in set(here.parent.glob("checkpoint-*")) - {here}:
                delete(older)

    def refuse_broken_weights(self) -> None:
        """Raise SPPOError where a trained weight is not finite. Under ZeRO-3 each rank looks at its part."""
        for name, weight in self.model.named_parameters():
            part = getattr(weight, "ds_tensor", weight).detach()
            # a sum takes no memory, and is finite only where all are
            if weight.requires_grad and not torch.isfinite(part.sum(dtype=torch.float32)):
                raise SPPOError(self._diverged(f"{name} has weights that are not finite"))

    def _diverged(self, what: str) -> str:
        """The message of a training that cannot go on; no checkpoint is written after it."""
        return (
            f"step {self.state.global_step}: {what}. Lower --learning_rate, or clip the gradients (--max_grad_norm 1); "
            f"then delete {self.args.output_dir} to train this iteration again"
        )

    def told_by_first(self, checkpoint: Path | None) -> Path | None:
        """The checkpoint that rank 0 goes on from, on every rank."""
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        told = self.accelerator.reduce(torch.tensor(step, device=self.args.device), "sum")  # the others add 0
        return Path(self.args.output_dir) / f"checkpoint-{int(told)}" if int(told) else None

    def begin(self) -> None:
        """Before the first step: check the log-probs, and find or compute the reference's."""
        self._began, self._first_step = time.monotonic(), self.state.global_step
        self.end_if_asked()
        self._check_lean()
        self.reference = find_reference(self)
        if self.anchor is not None:
            self.pull = self.recipe.anchor * (find_anchor(self, self.anchor) - self.reference)
        self.agreement = agreement(self.reference, self.train_dataset)
        if self.agreement and self.is_world_process_zero():
            print(f"train: {describe(self.agreement)}", flush=True)
        self.first_step = FirstStep(self.accelerator, at_reference=not self.state.global_step)
        self._began = time.monotonic()
        self._forget_metrics()

    def check_first_step(self) -> None:
        """Raise SPPOError where the gradients of the first step show that training cannot be right."""
        if self.first_step:
            self.first_step.check(self.model_wrapped, self.model.config, f"{self.table.key}.safetensors")
            self.first_step = None

    @torch.no_grad()
    def _check_lean(self) -> None:
        """Compare the lean log-probs with the plain ones on the shortest row; do without them where they differ.

        An architecture may change its logits in a way that its config does not show. All ranks take part.
        """
        shortest = int(self.train_dataset.lengths().argmin())
        batch = self._prepare_inputs(self.data_collator([Place(shortest)]))
        model, training = self.model_wrapped, self.model_wrapped.training
        model.eval()
        if self.lean:
            lean, plain = (self.logps(model, batch, way).float() for way in (True, False))
            tolerance = 1e-4 if self.accelerator.mixed_precision == "no" else 2e-2
            apart = ((lean - plain).abs() / plain.abs().clamp(min=1)).max()
            self.lean = self.accelerator.reduce(apart, "sum").item() <= tolerance * self.accelerator.num_processes
        if not self.lean and self.is_world_process_zero():
            print(
                "train: this architecture changes its logits, so log-probs come from full logits and take more memory"
            )
        model.train(training)

    def stop_asked(self) -> bool:
        """Whether training shall save and stop here. Rank 0 looks, so that all ranks agree."""
        if not may_stop():
            return False
        asked = torch.tensor(float(self.is_world_process_zero() and stop_asked()), device=self.args.device)
        return self.accelerator.reduce(asked, "sum").item() > 0

    def end_if_asked(self) -> None:
        """Raise KeyboardInterrupt, on all ranks, where training shall stop before its first step."""
        if self.stop_asked():
            self.is_stopped = True
            raise KeyboardInterrupt


class _Flow(TrainerCallback):
    """Begins when the model is prepared (sharded, wrapped) and has made no step; when to log and to save."""

    def __init__(self, trainer: SPPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.begin()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.check_first_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        if not last and self.trainer.stop_asked():
            control.should_save = control.should_training_stop = self.trainer.is_stopped = True
        if last or control.should_save:
            control.should_log = True  # so that a resumed run's next line covers the same steps
        if last:
            control.should_save = False  # the model itself is saved next; the optimiser's state is not needed any more


def disable_dropout(model: PreTrainedModel) -> None:
    """No dropout: the reference's log-probs must be those of the policy before its first step."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # what a module applies in a function: OPT's `dropout`, Bloom's `hidden_dropout`, attention's own
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)

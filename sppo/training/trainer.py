"""The SPPO trainer: transformers' Trainer with the reference as a table and the paper's loss.

A subclass of transformers.Trainer and not of trl.DPOTrainer: the loss, the columns, the collator and the truncation
would all have to be replaced there, and its cached reference log-probs do not notice new weights under an old path.
Our own loop would have to bring DeepSpeed, DDP, LoRA and checkpoints with it, which the Trainer has. What is here are
its hooks for the loss, the loader, the schedule, the log and the checkpoint.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sppo.command.errors import SPPOError
from sppo.method.loss import anchored_loss, divergence, preference_loss, sppo_all_loss
from sppo.models.loading import original_context
from sppo.recipe import Recipe
from sppo.store.directories import delete
from sppo.training.agreement import describe_agreement, engine_agreement
from sppo.training.batches import Batch, Batches, Loader, MicroBatch, MicroBatches, to_device
from sppo.training.checkpoints import disk_full_as_os_error, seal
from sppo.training.data import TrainingSet
from sppo.training.first_step import FirstLoss, FirstStep, loss_at_reference
from sppo.training.logps import CHUNK_TOKENS, Forward, rounding, tokens_of
from sppo.training.metrics import Metrics
from sppo.training.ranks import Stopped, stop_agreed
from sppo.training.reference import Anchor, LogProbTable, find_anchor, find_reference

# groups by length in which a micro-batch's responses go through the network; a GPU waits for smaller ones
_GROUPS, _GROUP_TOKENS = 4, 1024


class SPPOTrainer(Trainer):
    """Trains a policy on a TrainingSet. `is_lean`: whether the model has the forward of logps.add_lean_forward."""

    model: PreTrainedModel
    model_wrapped: torch.nn.Module
    # compute_loss gives a micro-batch's share of its step; the Trainer divides it by the accumulation steps
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        recipe: Recipe,
        data: TrainingSet,
        pad_id: int,
        table: LogProbTable,
        is_lean: bool = True,
        anchor: Anchor | None = None,
    ) -> None:
        super().__init__(model=model, args=args, callbacks=[_Flow(self)])
        self.recipe, self.table, self.anchor = recipe, table, anchor
        self.work = Path(str(args.output_dir))
        self.is_stopped = False  # before its end, because somebody asked for it

        deepspeed = self.accelerator.state.deepspeed_plugin
        if deepspeed is not None:
            # with the optimiser offloaded, DeepSpeed would put its own Adam in the place of any optimiser
            deepspeed.deepspeed_config.setdefault("zero_force_ds_cpu_optimizer", False)
        # weights that are spread over the ranks would be gathered again for each group
        is_spread = self.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3)
        # nor may ranks differ in the number of groups there
        context = None if is_spread else original_context(model.config)
        self.batches = Batches(data, pad_id, 1 if is_spread else _GROUPS, _GROUP_TOKENS, context)
        chunks = -(-recipe.batch_size * data.most_response_tokens() // CHUNK_TOKENS)
        self.forward = Forward(recipe.batch_size, chunks, is_lean)

        # what on_train_begin finds
        self.reference: torch.Tensor  # (S,): log pi_t of every response
        self.moved: torch.Tensor | None = None  # (S,), with an anchor: log pi_t - log pi_0
        self.agreement: dict[str, float] = {}  # see engine_agreement
        self.metrics: Metrics
        self.first_step: FirstStep | None = None  # until that is made

    # The Trainer's hooks

    def get_train_dataloader(self) -> Loader:
        """Every rank's own batches; no other sampler shares them out or repeats rows to come out even."""
        micro_batches = MicroBatches(
            self.batches.data.lengths(),
            self.args.per_device_train_batch_size,
            self.args.gradient_accumulation_steps,
            self.args.seed,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            group=self.recipe.loss_type != "kto_pair",
        )
        return Loader(self.batches, micro_batches, self.args.dataloader_pin_memory)

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
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A micro-batch's share of its step's mean loss; its metrics wait for the next log line.

        Averaged over accumulation steps and ranks, which is what follows, the shares are the mean over the step's
        rows, however they were dealt.
        """
        logps = self.forward.logps(model, inputs)  # (S,)
        ratios = logps - self.reference.to(logps.device)[inputs["sequences"]]
        if self.first_step:
            self.first_step.note(logps, ratios, inputs)

        counted = inputs["counted"]
        pair = inputs["pair"][:counted]  # (B, 2)
        win_rates = self.batches.data.win_rates.to(logps.device)[inputs["rows"][:counted]]  # (B, 3)
        losses, apart = self._losses_and_divergence(inputs, ratios, pair, win_rates)
        self.metrics.add(inputs, logps[pair], ratios[pair], win_rates[:, 1:], self.recipe.beta, apart)
        micro_batches = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        loss = losses.sum() * (micro_batches / inputs["step_rows"])
        if self.first_step:
            self.first_step.note_loss(loss / micro_batches)
        return loss

    def _losses_and_divergence(
        self, batch: Batch, ratios: torch.Tensor, pair: torch.Tensor, win_rates: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B,): the loss of each row that counts, --reg with it; and (B,): --reg alone, before its weight."""
        losses, apart = self._losses(batch, ratios, pair, win_rates), self._divergence(batch, ratios)
        return losses if apart is None else losses + self.recipe.reg_coef * apart, apart

    def _losses(self, batch: Batch, ratios: torch.Tensor, pair: torch.Tensor, win_rates: torch.Tensor) -> torch.Tensor:
        """(B,): the loss of each row that counts, without --reg. ratios: (S,); pair: (B, 2); win_rates: (B, 3)."""
        loss_type, beta = self.recipe.loss_type, self.recipe.beta
        a, b = ratios[pair].unbind(1)
        p, p_win, p_lose = win_rates.unbind(1)
        pull = None  # (S,), see anchored_loss
        if self.recipe.anchor and self.moved is not None:
            pull = -self.recipe.anchor * self.moved.to(ratios.device)[batch["sequences"]]

        if loss_type == "sppo_all":
            rates = self.batches.data.sequence_rates.to(ratios.device)[batch["sequences"]]  # (S,)
            losses = sppo_all_loss(ratios, rates, batch["row_of"], len(batch["rows"]), beta, pull)
            return losses[: batch["counted"]]
        if pull is not None:
            return anchored_loss(a, b, beta, p_win, p_lose, *pull[pair].unbind(1))
        if loss_type == "ipo_mean":
            a, b = (ratios / tokens_of(batch))[pair].unbind(1)
        losses = preference_loss(loss_type, a, b, beta, p, p_win, p_lose, self.recipe.label_smoothing)
        if loss_type == "kto_pair":
            return losses.view(2, len(pair)).mean(0)
        return losses

    def _divergence(self, batch: Batch, ratios: torch.Tensor) -> torch.Tensor | None:
        """(B,), with --reg: how far each row that counts is from the first model. ratios: (S,)."""
        if self.recipe.reg == "none" or self.moved is None:
            return None
        drift = ratios + self.moved.to(ratios.device)[batch["sequences"]]
        return divergence(self.recipe.reg, drift, batch["row_of"], len(batch["rows"]))[: batch["counted"]]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last line, averaged over all ranks; keep every line in metrics.jsonl."""
        is_training = "loss" in logs
        if is_training:
            logs["beta2_loss"] = self.recipe.beta**2 * logs["loss"]
            logs.update(self.metrics.line(self.state.global_step, self.state.max_steps))
            if not math.isfinite(logs["loss"]):
                raise SPPOError(self._diverged(f"the loss is {logs['loss']}"))
        super().log(logs, start_time)
        if is_training and self.is_world_process_zero():
            with open(self.work / "metrics.jsonl", "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": self.state.global_step, **logs}) + "\n")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint; the older ones are deleted only when every rank's part is on the disk."""
        self.refuse_broken_weights()  # they would replace a checkpoint that is good
        with disk_full_as_os_error():
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            here = self.work / f"checkpoint-{self.state.global_step}"
            seal(here)
            for older in set(self.work.glob("checkpoint-*")) - {here}:
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
            f"then delete {self.work} to train this iteration again"
        )

    # What the callback below calls

    def begin(self) -> None:
        """Before the first step: check the log-probs, and find or compute the reference's."""
        if stop_agreed(self.accelerator):
            raise Stopped
        self._choose_forward()
        self.reference = find_reference(
            self.model_wrapped,
            self.batches,
            self.accelerator,
            self.forward,
            self.table,
            resumed=self.work if self.state.global_step else None,
        )
        if self.anchor is not None:
            anchor = find_anchor(self.anchor, self.batches, self.accelerator, self.forward)  # (S,)
            self.moved = self.reference - anchor
        self.agreement = engine_agreement(self.reference, self.batches.data)
        if self.agreement and self.is_world_process_zero():
            print(f"train: {describe_agreement(self.agreement)}", flush=True)
        expected = None if self.state.global_step else self.first_loss()
        # with an anchor it was not known before
        if expected and self.anchor is not None and self.is_world_process_zero():
            print(f"train: {expected.described(self.recipe.beta)}", flush=True)
        self.first_step = FirstStep(self.accelerator, expected)
        self.metrics = Metrics(self.accelerator, self.state.global_step)

    def first_loss(self) -> FirstLoss:
        """What the first step's loss must be near: its rows' where the policy is the reference, so each log-ratio is 0.

        With an anchor it is known once `begin` has found the anchor's log-probs.
        """
        rows = next(self.get_train_dataloader().micro_batches.steps())
        batch = self.batches.make(MicroBatch(rows.tolist()))
        win_rates = self.batches.data.win_rates[batch["rows"]]  # (B, 3)
        furthest = rounding(self.accelerator) * tokens_of(batch).sqrt()  # (S,)

        def losses(ratios: torch.Tensor) -> torch.Tensor:
            return self._losses_and_divergence(batch, ratios, batch["pair"], win_rates)[0]

        return loss_at_reference(losses, furthest)

    def _choose_forward(self) -> None:
        """Do without the lean log-probs where they are not the plain ones, on the shortest row. All ranks take part."""
        batch = to_device(self.batches.shortest(), self.args.device)
        if self.forward.is_lean:
            self.forward.is_lean = self.forward.agrees_with_plain(self.model_wrapped, batch, self.accelerator)
        if not self.forward.is_lean and self.is_world_process_zero():
            print(
                f"train: a {self.model.config.model_type} has no lean forward, so log-probs come from full logits: "
                "each micro-batch takes tokens x vocabulary x 4 bytes more"
            )

    def check_first_step(self) -> None:
        """Raise SPPOError where the first step shows that training cannot be right; warn where its loss is unusual."""
        if self.first_step:
            self.first_step.check(self.model_wrapped, self.model.config, f"{self.table.key}.safetensors")
            self.first_step = None


class _Flow(TrainerCallback):
    """Calls the trainer's `begin` once the model is sharded and wrapped, and decides when to log, to save, to stop."""

    def __init__(self, trainer: SPPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.begin()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.check_first_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        if not last and stop_agreed(self.trainer.accelerator):
            control.should_save = control.should_training_stop = self.trainer.is_stopped = True
        if last or control.should_save:
            control.should_log = True  # so that a resumed run's next line covers the same steps
        if last:
            control.should_save = False  # the model itself is saved next; the optimiser's state is not needed any more

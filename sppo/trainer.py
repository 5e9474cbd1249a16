"""The SPPO trainer: transformers' Trainer with the reference as a table and the paper's loss.

A subclass of transformers.Trainer and not of trl.DPOTrainer: the loss, the columns, the collator and the truncation
would all have to be replaced there, and its cached reference log-probs do not notice new weights under an old path.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from sppo.config import Recipe
from sppo.data import TrainingSet, collate
from sppo.errors import SPPOError
from sppo.loss import preference_loss, response_logps
from sppo.progress import progress


class SPPOTrainer(Trainer):
    """Trains a policy on a TrainingSet. `table` is where the reference's log-probs are kept for a resume."""

    # our loss is a mean over the micro-batch: the Trainer divides it by the accumulation steps
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        recipe: Recipe,
        data: TrainingSet,
        pad_id: int,
        table: Path,
    ) -> None:
        self.recipe, self.table = recipe, table
        self.reference: torch.Tensor | None = None  # (N, 2): log pi_t of chosen and rejected
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2))
        self._tokens, self._since = 0, time.monotonic()
        super().__init__(
            model=model,
            args=args,
            train_dataset=data,
            data_collator=partial(collate, pad_id=pad_id),
            callbacks=[_ReferenceFirst(self)],
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule is laid out over schedule_epochs, wherever training stops.

        A warm-up starts at a rate of 0, so a training of one step would change nothing: it has no warm-up.
        """
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        horizon = self.recipe.schedule_epochs or self.recipe.num_train_epochs
        return super().create_scheduler(round(num_training_steps * horizon / self.recipe.num_train_epochs), optimizer)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Mean loss of a micro-batch (see data.collate); its metrics are summed up for the next log line."""
        index = inputs["index"].cpu()
        logps = self._logps(model, inputs)  # (2B,)
        a, b = (logps - self.reference[index].T.reshape(-1).to(logps.device)).chunk(2)
        p, p_win, p_lose = self.train_dataset.win_rates[index].T.to(logps.device)
        beta = self.recipe.beta
        loss = preference_loss(self.recipe.loss_type, a, b, beta, p, p_win, p_lose).mean()
        self._add_metrics(loss, a, b, logps, p_win, p_lose)
        self._tokens += int(inputs["attention_mask"].sum())
        return loss

    def _logps(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
        return response_logps(logits, inputs["input_ids"], inputs["response_mask"])

    @torch.no_grad()
    def _add_metrics(
        self,
        loss: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        logps: torch.Tensor,
        p_win: torch.Tensor,
        p_lose: torch.Tensor,
    ) -> None:
        beta = self.recipe.beta
        chosen, rejected = logps.chunk(2)
        rows = {
            "beta2_loss": (beta**2 * loss).expand_as(a),
            "rewards/chosen": beta * a,
            "rewards/rejected": beta * b,
            "rewards/accuracies": (a > b).float(),
            "rewards/margins": beta * (a - b),
            "rewards/chosen_target": p_win - 0.5,  # what SPPO moves beta * a towards
            "rewards/rejected_target": p_lose - 0.5,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        for name, values in rows.items():
            self._sums[name] += torch.stack([values.sum(), torch.tensor(float(len(values)), device=a.device)]).cpu()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last line, averaged over all ranks; keep every line in metrics.jsonl."""
        if "loss" in logs and self._sums:
            names = list(self._sums)
            local = torch.stack([self._sums[n] for n in names] + [torch.tensor([float(self._tokens), 1.0])])
            total = self.accelerator.reduce(local.to(self.accelerator.device), "sum").cpu()
            logs.update({n: (s / c).item() for n, (s, c) in zip(names, total[:-1], strict=True)})
            logs["tokens_per_second"] = round(total[-1, 0].item() / (time.monotonic() - self._since), 1)
            self._sums.clear()
            self._tokens, self._since = 0, time.monotonic()
        super().log(logs, start_time)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "metrics.jsonl"
            with open(path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": self.state.global_step, **logs}) + "\n")

    @torch.no_grad()
    def compute_reference(self) -> None:
        """Fill `reference` with pi_t's log-probs: the policy's own, before its first step.

        All ranks share the rows and make the same number of forward passes, which ZeRO-3 needs. A resumed run
        reads the table instead: its policy has moved on. Raises SPPOError if a resumed run finds no table.
        """
        from safetensors.torch import load_file, save_file

        if self.state.global_step:
            if not self.table.exists():
                raise SPPOError(
                    f"{self.table} is gone, so this run cannot be resumed; delete its directory and start again"
                )
            self.reference = load_file(self.table)["logps"]
            return
        model, ranks = self.model_wrapped, self.accelerator.num_processes
        training = model.training
        model.eval()
        size = self.args.per_device_train_batch_size
        rows = len(self.train_dataset)
        table = torch.full((rows, 2), float("nan"))
        step = size * ranks
        with progress(rows, "reference log-probs", "pair") as bar:
            for start in range(0, rows, step):
                mine = [(start + self.accelerator.process_index * size + i) % rows for i in range(size)]
                batch = self.data_collator([self.train_dataset[i] for i in mine])
                batch = {k: v.to(self.accelerator.device) for k, v in batch.items()}
                logps = torch.stack(self._logps(model, batch).chunk(2), 1)  # (B, 2)
                index, logps = self.accelerator.gather((batch["index"], logps))
                table[index.cpu()] = logps.float().cpu()
                bar.update(min(step, rows - start))
        model.train(training)
        if not table.isfinite().all():
            bad = (~table.isfinite()).any(1).nonzero().flatten().tolist()
            raise SPPOError(f"the model's log-probs are not finite for {len(bad)} rows, the first are {bad[:10]}")
        self.reference = table
        if self.is_world_process_zero():
            self.table.parent.mkdir(parents=True, exist_ok=True)
            save_file({"logps": table}, self.table)
        self.accelerator.wait_for_everyone()


class _ReferenceFirst(TrainerCallback):
    """Computes the reference when the model is prepared (sharded, wrapped) and has made no step."""

    def __init__(self, trainer: SPPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.compute_reference()
        self.trainer._since = time.monotonic()


def disable_dropout(model: PreTrainedModel) -> None:
    """No dropout: the reference's log-probs must be those of the policy before its first step."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0

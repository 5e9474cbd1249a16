"""A training as it is asked for: its flags, what they contradict, what identifies it. Nothing heavy is loaded."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sppo.cli import require_dir
from sppo.command.errors import SPPOError, UsageError
from sppo.command.importing import is_installed
from sppo.models.dates import today
from sppo.models.files import public_name
from sppo.models.policy import Policy, open_policy, policy_of
from sppo.recipe import Recipe, load_recipe, nearest, reads_anchor
from sppo.store.directories import refuse_overlap, refuse_unknown, sweep, target_of, work_of, working
from sppo.store.files import atomic, changed, digest, read_json
from sppo.store.manifest import MANIFEST, Stage, read_manifest
from sppo.training.checkpoints import refuse_another
from sppo.training.dataset import dataset_file

# the settings that decide the result; the others only decide where and how fast it is computed
IDENTITY = (
    "seed loss_type beta anchor reg reg_coef label_smoothing learning_rate lr_scheduler_type warmup_ratio "
    "num_train_epochs schedule_epochs optim weight_decay max_grad_norm max_prompt_length max_length "
    "attn_implementation train_thoughts chat_template_kwargs use_peft lora_r lora_alpha lora_target_modules "
    "load_in_4bit merge_adapter"
).split()

_IF_MEANT = f"If the change was meant: copy the model without its {MANIFEST}, change the copy, and name it as --model"

# names that are known without a look at transformers
USUAL = {"optim": ("rmsprop", "adamw_torch"), "lr_scheduler_type": ("linear", "cosine", "constant")}
# schedules with settings of their own
NEED_MORE = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau")


def is_first_rank() -> bool:
    """Whether this is rank 0 of a training, or its only process."""
    return os.environ.get("RANK", "0") == "0"


@dataclass
class Training:
    """A training as it was asked for, before anything heavy is loaded."""

    recipe: Recipe
    overwrite: bool
    source: Policy
    anchor: Policy | None  # with --anchor or --reg: what they pull towards
    dataset: Path
    data_name: str  # as the model card says it
    output_dir: Path
    processes: int
    steps: int  # accumulation steps
    stage: Stage

    @property
    def work(self) -> Path:
        """Where everything is until the model is whole."""
        return work_of(self.output_dir)

    def is_done(self) -> bool:
        """Whether output_dir holds this very training's model. Raises SPPOError if it, or what a killed try left, holds
        another's, and for a directory that may not be replaced."""
        if not self.overwrite:
            if is_first_rank():
                self._restore()
            if self.stage.is_current():
                if is_first_rank():
                    print(f"train: done: {self.output_dir}")
                    sweep(self.output_dir)
                return True
            self.stage.refuse_foreign()
            refuse_another(self.work, self.stage)
        refuse_unknown(self.output_dir, self.stage.name)
        return False

    def refuse_others(self) -> None:
        """Raise OtherWorkError where another training's model is in output_dir, or what a killed try at it left."""
        self.stage.refuse_others()
        refuse_another(self.work, self.stage)

    def _restore(self) -> None:
        """Copy the policy's own files into the finished model again, where they are not what was written.

        Its weights are good, so that nothing needs to be trained for a tokenizer's file. What is changed is kept.
        """
        manifest = self.output_dir / MANIFEST
        if not manifest.exists():
            return
        outputs = read_manifest(manifest)["outputs"]
        for name in changed(self.output_dir, outputs):
            path, last = self.output_dir / name, name.removeprefix("merged/")
            sources = (self.source.tokenizer_dir / last, self.source.weights / last)
            source = next((s for s in sources if s.is_file() and digest(s) == outputs[name]), None)
            if source is None:
                continue
            was = "was gone"
            if path.exists():
                kept = self.output_dir.with_name(f"{self.output_dir.name}.changed-{name.replace('/', '-')}")
                os.replace(path, kept)
                was = f"had changed since it was written, and is kept as {kept}"
            with atomic(path) as temporary:
                shutil.copyfile(source, temporary)
            print(f"train: {path} {was}. It is copied again from {source}. {_IF_MEANT}", flush=True)

    @contextmanager
    def at_work(self) -> Iterator[bool]:
        """Hold the work directory, from before anything in it is deleted until the model is in place: rank 0 for all.

        Whether anything is left to do: not where another process has made this model since is_done. Raises SPPOError
        where one is making it, and where one has made it and other ranks wait for this one.
        """
        if not is_first_rank():
            yield True
            return
        with working(self.output_dir):
            is_made = not self.overwrite and self.stage.is_current()
            if is_made and self.processes > 1:
                raise SPPOError(f"{self.output_dir} was made by another process meanwhile; run the same command again")
            yield not is_made


def prepare(recipe: Recipe, processes: int, overwrite: bool = False) -> Training:
    """The training that a recipe asks for, in so many processes.

    Raises UsageError for settings that contradict each other, SPPOError for a model or data set that cannot be read.
    """
    asked = str(require_dir("--dataset", recipe.dataset or recipe.data_dir))
    output_dir = target_of(require_dir("--output_dir", recipe.model_dir))
    check_flags(recipe)
    steps = accumulation(recipe, processes)
    source, anchor = policy_of(recipe), None
    refuse_overlap(output_dir, [part for part in (source.weights, source.adapter) if part])
    recipe = _with_date(recipe, output_dir, overwrite)
    source = dataclasses.replace(source, date=recipe.date)
    if reads_anchor(recipe):
        if not recipe.anchor_model:
            flag = "--anchor" if recipe.anchor else "--reg"
            raise UsageError(f"{flag} needs --anchor_model: the model that the run began with, most often")
        anchor = open_policy(recipe.anchor_model, recipe.anchor_revision, recipe.trust_remote_code)
        refuse_other_vocabulary(recipe, anchor, source)
        _refuse_changed_anchor(recipe, anchor)
    path = dataset_file(asked, recipe)
    inputs = {"model": source.identity(), "dataset": digest(path)}
    settings = {"global_batch_size": recipe.batch_size * steps * processes}
    unused = {"anchor": not recipe.anchor, "train_thoughts": recipe.train_thoughts}  # as in all older runs
    unused |= dict.fromkeys(("reg", "reg_coef"), recipe.reg == "none")
    settings |= {k: getattr(recipe, k) for k in IDENTITY if not unused.get(k)}
    settings |= source.date_identity(recipe.chat_template_kwargs)
    if anchor:
        inputs["anchor"] = anchor.identity()
    if recipe.loss_type == "kto_pair":
        # its loss couples the rows of a micro-batch; which rows those are, the global batch and this decide
        settings["batch_size"] = recipe.batch_size
    stage = Stage("train", output_dir / MANIFEST, [], inputs, settings)
    name = asked if asked.count("/") == 1 and not Path(asked).exists() else path.name
    return Training(recipe, overwrite, source, anchor, path, name, output_dir, processes, steps, stage)


def refuse_other_vocabulary(recipe: Recipe, anchor: Policy, source: Policy) -> None:
    """Raise SPPOError for an anchor to which the policy's token ids are other tokens."""
    if anchor.tokenizer().get_vocab() != source.tokenizer().get_vocab():
        raise SPPOError(f"--anchor_model {recipe.anchor_model} has another vocabulary than {recipe.model}")


def _refuse_changed_anchor(recipe: Recipe, anchor: Policy) -> None:
    """Raise SPPOError where the anchor is not the model any more that it was in the first iteration of the run.

    A branch on the Hub moves, and a directory can be written to: the iterations would be pulled to different models.
    """
    first = Path(recipe.run_dir) / "iter1"
    manifest, written = first / "model" / MANIFEST, first / "recipe.yaml"
    if recipe.iteration < 2 or not recipe.run_dir or not (manifest.exists() and written.exists()):
        return
    before = load_recipe(written)
    if (before.anchor_model, before.anchor_revision) != (recipe.anchor_model, recipe.anchor_revision):
        return  # another one was asked for
    known = read_json(manifest)["inputs"].get("anchor")
    if known not in (None, anchor.identity()):
        raise SPPOError(
            f"{public_name(recipe.anchor_model)}, which this run is pulled towards, has changed since iteration 1. "
            "Bring the old one back: of a model on the Hub, name its commit with --anchor_model and --anchor_revision"
        )


def _with_date(recipe: Recipe, output_dir: Path, overwrite: bool) -> Recipe:
    """The recipe with the date for the template of rows without token ids: its own, or the one that the training here
    began with. Today where none has begun; `overwrite` takes a killed try for begun, and a finished one not.

    A training of an older version names none: then it stays empty, which is today at each start, as it was then.
    """
    places = [work_of(output_dir) / "identity.json", *([] if overwrite else [output_dir / MANIFEST])]
    begun = [read_json(path) for path in places if path.exists()] if not recipe.date else []
    if not begun or not isinstance(begun[0], dict):  # a damaged one is refused where it is compared
        return dataclasses.replace(recipe, date=recipe.date or today())
    return dataclasses.replace(recipe, date=begun[0].get("settings", {}).get("date", ""))


def check_flags(recipe: Recipe) -> None:
    """Raise UsageError for settings that contradict each other."""
    if recipe.num_train_epochs <= 0:
        raise UsageError("--num_train_epochs must be above 0")
    if recipe.max_prompt_length >= recipe.max_length:
        raise UsageError("--max_prompt_length must be below --max_length: the response needs room")
    _require_anchor(recipe)
    if recipe.loss_type == "sppo_all" and recipe.select != Recipe.select:
        raise UsageError(
            f"--select {recipe.select} is for losses of a pair; sppo_all trains on all responses of a prompt"
        )
    if recipe.label_smoothing and recipe.loss_type != "sigmoid":
        raise UsageError(f"--label_smoothing is for --loss_type sigmoid; {recipe.loss_type} has win rates or none")
    for flag in ("load_in_4bit", "merge_adapter"):
        if getattr(recipe, flag) and not recipe.use_peft:
            raise UsageError(f"--{flag} goes with --use_peft")


def _require_anchor(recipe: Recipe) -> None:
    """Raise UsageError for an --anchor or a --reg that nothing would read, or that would do something else."""
    reg = recipe.reg
    if recipe.anchor and recipe.loss_type not in ("sppo", "sppo_all"):
        raise UsageError(f"--anchor is for --loss_type sppo and sppo_all, not {recipe.loss_type}")
    if reg != "none" and recipe.loss_type not in ("sppo", "sppo_single", "sppo_all"):
        raise UsageError(f"--reg is for --loss_type sppo, sppo_single and sppo_all, not {recipe.loss_type}")
    if reg != "none" and recipe.reg_coef < 1e-12:
        raise UsageError(f"--reg {reg} needs --reg_coef, its weight in the loss, of 1e-12 or more; 0.5 is a good start")
    if reg == "none" and recipe.reg_coef:
        raise UsageError("--reg_coef is the weight of --reg, which is none: name reverse, forward or both")
    if reg != "none" and recipe.anchor:
        raise UsageError(
            "--anchor and --reg both pull towards the first model, and --reg reverse to the same end as --anchor; "
            "take one of them. --reg both adds the forward KL to the reverse one"
        )
    if recipe.anchor_revision and not recipe.anchor_model:
        raise UsageError("--anchor_revision goes with --anchor_model; without it the run's first model is the anchor")
    if recipe.anchor_model and not reads_anchor(recipe):
        raise UsageError("--anchor_model goes with --anchor or --reg")
    if reads_anchor(recipe) and recipe.load_in_4bit:
        flag = "--anchor" if recipe.anchor else "--reg"
        raise UsageError(f"{flag} with --load_in_4bit: the anchor is read unquantised, so the two would not compare")


def known_names(flag: str) -> list[str]:
    """transformers' own names of optimisers or of schedules."""
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    return [member.value for member in {"optim": OptimizerNames, "lr_scheduler_type": SchedulerType}[flag]]


def check_machine(recipe: Recipe, gpu: bool | None = None) -> None:
    """Raise UsageError for settings that the libraries or the devices here cannot do.

    `gpu`: whether there will be a GPU; None asks PyTorch. Unusual names need an import of transformers, of seconds.
    """
    if ("bnb" in recipe.optim or "8bit" in recipe.optim) and not is_installed("bitsandbytes"):
        raise UsageError(f"--optim {recipe.optim} needs a package: pip install bitsandbytes")
    if recipe.lr_scheduler_type in NEED_MORE:
        raise UsageError(f"--lr_scheduler_type {recipe.lr_scheduler_type} needs settings that have no flag here")
    for flag, usual in USUAL.items():
        name = getattr(recipe, flag)
        if name not in usual and name not in (names := known_names(flag)):
            hint = nearest(name, names) or f"; one of {', '.join(names)}"
            raise UsageError(f"--{flag} {name}: transformers does not know it{hint}")
    if recipe.load_in_4bit:
        import torch

        gpu = torch.cuda.is_available() if gpu is None else gpu
        if not is_installed("bitsandbytes") or not gpu:
            raise UsageError("--load_in_4bit needs a GPU and bitsandbytes (pip install bitsandbytes); without it: LoRA")
    if recipe.report_to != "none" and not is_installed(recipe.report_to):
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

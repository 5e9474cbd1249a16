"""From the trained weights to a whole model directory, which appears in one step."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.models.files import public_name, tokenizer_files
from sppo.models.loading import load_causal_lm, load_config
from sppo.models.policy import Policy
from sppo.store.directories import clear, put_in_place
from sppo.store.files import digest, read_json, write_json
from sppo.store.manifest import MANIFEST, Stage
from sppo.training.checkpoints import disk_full_as_os_error
from sppo.training.model_card import write_card
from sppo.training.network import disable_noise
from sppo.training.read_back import check_saved, logps_of, restore_untrained
from sppo.training.settings import IDENTITY, Training

OTHERS = ("README.md", "metrics.jsonl")  # of a model's files: see finish_model

if TYPE_CHECKING:
    import torch

    from sppo.training.data import TrainingSet


def finish(
    training: Training, metrics: dict[str, Any], data: TrainingSet, logps: torch.Tensor | None, is_half: bool
) -> None:
    """Complete the model in <work>/final and rename it to output_dir in one step.

    logps: read_back.logps_of the model in memory, None for an adapter; is_half: whether computed in half precision.
    """
    source, work, stage, model = training.source, training.work, training.stage, training.recipe.model
    final = work / "final"
    (final / "training_args.bin").unlink(missing_ok=True)  # a pickle
    if training.recipe.use_peft:
        _name_base(training, final / "adapter_config.json")
        if training.recipe.merge_adapter:
            _merge(source, final)
    else:
        with disk_full_as_os_error():
            restore_untrained(source.weights, final)
        copy_files(source.weights, final, ("generation_config.json",))
    copy_tokenizer(source.tokenizer_dir, final)
    if source.remote_code:
        copy_files(source.weights, final, tuple(p.name for p in source.weights.glob("*.py")))
    if logps is not None:
        check_saved(final, source, logps, is_half)
    shutil.copyfile(work / "metrics.jsonl", final / "metrics.jsonl")
    write_card(final, training.recipe, training.data_name, stage.inputs["dataset"], metrics, data.counts, IDENTITY)
    finish_model(stage, final, data.counts, model=model, model_name=public_name(model), **metrics)
    put_in_place(final, training.output_dir, stage.name)
    clear(work)


def finish_model(stage: Stage, final: Path, counts: dict[str, Any], **more: Any) -> None:
    """Write the manifest into a model's directory. It knows every file there, those in subdirectories too.

    `outputs` are those that decide what follows: where one changes, the model is not what was made. The `others` tell
    about it, and a person may change them.
    """
    stage.manifest = final / MANIFEST
    files = sorted(path for path in final.rglob("*") if path.is_file() and path != stage.manifest)
    stage.outputs = [path for path in files if path.name not in OTHERS]
    others = {path.relative_to(final).as_posix(): digest(path) for path in files if path.name in OTHERS}
    stage.finish(counts, others=others, **more)


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy the files of these names; delete those in `target` that `source` does not have."""
    for name in names:
        (target / name).unlink(missing_ok=True)
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files as they are, so that one iteration's tokens are the next one's."""
    for name in tokenizer_files(source):
        (target / name).parent.mkdir(exist_ok=True)
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

    target = final / "merged"
    merged = load_causal_lm(dataclasses.replace(source, adapter=final), torch.float32)
    disable_noise(merged)
    logps = logps_of(merged.train(), source)
    with disk_full_as_os_error():
        merged.to(load_config(source).dtype or torch.float32).save_pretrained(target)
        restore_untrained(source.weights, target)
    copy_files(source.weights, target, ("generation_config.json",))
    copy_tokenizer(source.tokenizer_dir, target)
    check_saved(target, source, logps)

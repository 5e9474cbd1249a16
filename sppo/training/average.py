"""The mean of several models' weights as a model: a network's stand-in for the average policy of the iterates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError
from sppo.models.files import StoredTensor, stored_tensors, weight_files
from sppo.models.policy import Policy, open_policy
from sppo.store.directories import appearing, refuse_overlap, target_of
from sppo.store.manifest import MANIFEST, Stage
from sppo.training.save import copy_files, copy_tokenizer, finish_model

Tensors = dict[str, StoredTensor]  # of one model, by name


def average(models: list[str], output_dir: Path, overwrite: bool = False) -> None:
    """Write the model whose every weight is the mean of the models', in the first one's precision, files and tokenizer.

    Means are taken in float64, one tensor in memory at a time. The directory appears when it is whole. Raises SPPOError
    for adapters, and for models that differ in their weights' names and shapes, their tokenizer or chat template.
    """
    target = target_of(output_dir)
    policies = [open_policy(model) for model in models]
    refuse_overlap(target, [policy.weights for policy in policies])
    if adapters := [model for model, policy in zip(models, policies, strict=True) if policy.adapter]:
        raise SPPOError(
            f"{adapters[0]} is an adapter, and the mean of adapters is no mean of models; pass merged copies"
        )
    first, *others = policies
    stored = [stored_tensors(policy.weights) for policy in policies]
    for policy, tensors in zip(others, stored[1:], strict=True):
        _refuse_different(first, stored[0], policy, tensors)
    stage = Stage("average", target / MANIFEST, [], {"models": [policy.identity() for policy in policies]}, {})
    if not overwrite and not stage.make_ready():
        return
    with appearing(target, stage.name) as final:
        copy_files(first.weights, final, ("config.json", "generation_config.json", "model.safetensors.index.json"))
        copy_tokenizer(first.tokenizer_dir, final)
        for path in weight_files(first.weights):
            _mean_file(path, stored[1:], final / path.name)
        counts = {"models": len(models), "weights": len(stored[0])}
        finish_model(stage, final, counts, models=models)
    print(f"average: {output_dir}: the mean of {len(models)} models")


def _refuse_different(first: Policy, wanted: Tensors, policy: Policy, found: Tensors) -> None:
    shapes, others = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (wanted, found))
    if differs := sorted(name for name in {*shapes, *others} if shapes.get(name) != others.get(name)):
        raise SPPOError(f"{policy.weights} and {first.weights} have other weights: {', '.join(differs[:3])}")
    here, there = policy.tokenizer(), first.tokenizer()
    if here.get_vocab() != there.get_vocab() or here.chat_template != there.chat_template:
        raise SPPOError(f"{policy.weights} and {first.weights} have another tokenizer or chat template")


def _mean_file(file: Path, others: list[Tensors], target: Path) -> None:
    """The mean of all tensors of the first model's `file` and of the same tensors of the other models."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    made: dict[str, Any] = {}
    with safe_open(file, "pt") as own:
        for key in own.keys():  # noqa: SIM118 - it is no dictionary
            tensor = own.get_tensor(key)
            total = tensor.to(torch.float64)
            for tensors in others:
                with safe_open(tensors[key].file, "pt") as other:
                    total += other.get_tensor(key).to(torch.float64)
            made[key] = (total / (1 + len(others))).to(tensor.dtype)
        save_file(made, target, metadata=own.metadata())

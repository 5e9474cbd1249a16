"""What a training will do, tried on a miniature of the network before anything is drawn.

An architecture may fail, or compute something else, only in what training does with it: in training mode, with
recomputed activations, with an adapter, after a merge. That would be known after hours of drawing and ranking.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import warnings
from typing import Any

from sppo.command.errors import FOREIGN, SPPOError, first_line
from sppo.models.loading import add_adapter, load_config, merge, token_logps
from sppo.models.miniature import ROUNDING, ids_for, miniature, refuse_not_causal
from sppo.models.policy import Policy
from sppo.recipe import Recipe
from sppo.training.network import disable_noise, lora_for

# Nats by which log-probs in training may differ from those in evaluation. Rounding made 0.006 where it decides which
# numbers are set to 0 (Gemma-3n); noise and what RWKV does made 0.17 and more.
_NOISE = 0.02
_ADVICE = "Train other modules, for example --lora_target_modules q_proj,v_proj, or all weights (without --use_peft)"


def try_training(recipe: Recipe, policy: Policy) -> str:
    """Raise SPPOError where the training that is asked for cannot be made, or would be wrong, on this architecture.

    Call network.check_network first. Returns why nothing could be tried; "" where it was.
    """
    try:
        network = miniature(load_config(policy), policy.remote_code)
    except SPPOError as error:
        return str(error)
    refuse_not_causal(network)
    try:
        if not recipe.use_peft or _try_merge(recipe, policy, copy.deepcopy(network)):
            _try_step(recipe, policy, network)
    except FOREIGN as error:
        if isinstance(error, SPPOError):
            raise
        raise SPPOError(
            f"a {network.config.model_type} cannot be trained with these settings: in a miniature of it, "
            f"{type(error).__name__}: {first_line(error)}"
        ) from None
    return ""


def has_unused_weights(small: Any | None) -> bool:
    """Whether weights have no part in the log-probs, as those for pictures; DDP has to be told.

    small: the network's miniature. Yes where there is none.
    """
    if small is None:
        return True
    _logps(small).sum().backward()
    return any(weight.requires_grad and weight.grad is None for weight in small.parameters())


def _logps(network: Any) -> Any:
    """(2, 15): log-probs of some tokens by a miniature."""
    return token_logps(network, ids_for(network))


def _try_step(recipe: Recipe, policy: Policy, network: Any) -> None:
    """A forward in training mode, which must be that of eval mode, and a backward, with what the recipe asks for."""
    import torch

    kind = network.config.model_type
    if recipe.use_peft:
        network = add_adapter(network, dataclasses.replace(policy, adapter=None), _lora(recipe, policy, network))
        _fill(network)
    with torch.no_grad():
        wanted = _logps(network.eval())
    disable_noise(network)
    network.train()
    if recipe.gradient_checkpointing:
        _checkpoint(network, kind)
    logps = _logps(network)
    apart = (logps.detach() - wanted).abs().max().item()
    if apart > _NOISE:
        raise SPPOError(
            f"a {kind} computes other log-probs in training than in evaluation ({apart:.2g} nats apart in a "
            "miniature, without dropout), so the loss would compare with a wrong reference"
            + (f". {_ADVICE}" if recipe.use_peft else "")
        )
    logps.sum().backward()
    if not any(weight.grad is not None and weight.grad.any() for weight in network.parameters()):
        raise SPPOError(f"a {kind}: no weight that is trained has a part in the log-probs; see --lora_target_modules")


def _checkpoint(network: Any, kind: str) -> None:
    try:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise SPPOError(
            f"a {kind} cannot recompute activations ({str(error).rstrip('.')}); pass --gradient_checkpointing=false"
        ) from None
    if hasattr(network, "enable_input_require_grads"):
        network.enable_input_require_grads()


def _try_merge(recipe: Recipe, policy: Policy, network: Any) -> bool:
    """An adapter with weights of its own, saved, read back and merged: the log-probs must stay.

    False where the miniature has not the layers that the adapter is for.
    """
    from peft import PeftModel

    config, base = network.config, copy.deepcopy(network)
    try:
        adapted = add_adapter(network, dataclasses.replace(policy, adapter=None), _lora(recipe, policy, network))
    except SPPOError:  # check_network has put it on the network itself: on layers that a miniature does not have
        return False
    _fill(adapted)
    wanted = dict(adapted.named_parameters())
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        adapted.save_pretrained(directory)
        warnings.simplefilter("ignore")  # what is wrong is said below
        read = PeftModel.from_pretrained(base, directory)
    lost = [
        name.removeprefix("base_model.model.").partition(".lora_")[0]
        for name, weight in read.named_parameters()
        if not weight.equal(wanted[name])
    ]
    if lost:
        raise SPPOError(
            f"--use_peft: the weights of an adapter on {sorted(lost)[0]} are not found again when it is read back. "
            f"{_ADVICE}"
        )
    apart = merge(read)[1]
    if apart > ROUNDING:
        raise SPPOError(
            f"--use_peft: on a {config.model_type}, an adapter gives other log-probs once it is merged into its base "
            f"({apart:.2g} nats apart in a miniature). {_ADVICE}"
        )
    return True


def _fill(adapted: Any) -> None:
    """Give an adapter weights of its own: a new one changes nothing."""
    import torch

    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.05)


def _lora(recipe: Recipe, policy: Policy, network: Any) -> Any:
    """The peft.LoraConfig that would be trained: the policy's own where it is an adapter."""
    from peft import LoraConfig

    if policy.adapter is None:
        return lora_for(recipe, network, network)
    own = LoraConfig.from_pretrained(str(policy.adapter))
    own.inference_mode = False  # as it is stored
    return own

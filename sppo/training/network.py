"""The network that is trained: what of it is trained, and whether that can be. The preflight asks here too."""

from __future__ import annotations

import copy
import re
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from sppo.command.errors import SPPOError
from sppo.models.loading import add_adapter, empty_network, load_config
from sppo.models.miniature import ids_for, miniature_of
from sppo.models.policy import Policy
from sppo.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def check_network(recipe: Recipe, policy: Policy) -> None:
    """Raise SPPOError for a policy that cannot be trained as asked, without a look at its weights."""
    refuse_untrainable(recipe, policy)
    network = empty_network(policy, recipe.attn_implementation)
    if recipe.use_peft and policy.adapter is None:
        add_adapter(network, policy, lora_for(recipe, miniature_of(policy), network))


def refuse_untrainable(recipe: Recipe, policy: Policy) -> None:
    """Raise SPPOError where the config alone says that training would go wrong.

    For quantised weights that would have to be trained themselves. And for Doge in rows beyond its `keep_window_size`:
    it reads that many of all a row's tokens, some behind a token too, so that log-probs in training are others.
    """
    config = load_config(policy)
    if getattr(config, "quantization_config", None) is not None and not recipe.use_peft:
        raise SPPOError(
            f"model {policy.weights}: its weights are quantised, so they cannot be trained; pass --use_peft to train "
            "an adapter on them, or take the model in bfloat16"
        )
    window = getattr(config, "keep_window_size", None)
    if window is not None and recipe.max_length > window:
        raise SPPOError(
            f"model {policy.weights}: in rows beyond its keep_window_size of {window} tokens, a {config.model_type} "
            f"reads the tokens behind a token too; pass --max_length of at most {window}"
        )


def lora_and_quantization(recipe: Recipe) -> tuple[Any, Any]:
    """trl's LoraConfig (None without --use_peft) and its quantisation: QLoRA's NormalFloat (arXiv 2305.14314), or None.

    Without dropout: the policy before its first step is the reference.
    """
    if not (recipe.use_peft or recipe.load_in_4bit):
        return None, None
    from peft import LoraConfig
    from trl import ModelConfig, get_peft_config, get_quantization_config  # pyright: ignore[reportPrivateImportUsage]

    asked = ModelConfig(
        use_peft=recipe.use_peft,
        lora_r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=0.0,
        lora_target_modules=["all-linear"],
        load_in_4bit=recipe.load_in_4bit,
        use_bnb_nested_quant=True,
        dtype="bfloat16",  # of the products in 4 bits
    )
    lora = get_peft_config(asked)
    if isinstance(lora, LoraConfig) and recipe.lora_target_modules != "all-linear":
        # not through ModelConfig: it makes a text of a list of one, and peft takes a text for a regular expression
        names = {name.strip() for name in recipe.lora_target_modules.split(",")}
        lora.target_modules = names  # pyright: ignore[reportAttributeAccessIssue] - peft itself makes sets of lists
    return lora, get_quantization_config(asked)


def lora_for(recipe: Recipe, small: Any | None, network: Any) -> Any:
    """The peft.LoraConfig of --use_peft for a network. `all-linear` is the linear layers that an adapter works on.

    small: the network's miniature; None where none can be made.
    """
    lora = lora_and_quantization(recipe)[0]
    if recipe.lora_target_modules == "all-linear":
        unsuited = _unsuited_layers(network, lora)
        if small is not None:
            unsuited |= _layers_not_plain(small)
        lora.exclude_modules = "|".join(sorted(unsuited)) or None  # a regular expression
    return lora


def _unsuited_layers(network: Any, lora: Any) -> set[str]:
    """Patterns of the names of linear layers that share weights, or on which peft refuses an adapter.

    Weights that several layers share would get the change of each of them when adapters are merged.
    """
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    linear = _linear_layers(network)
    users = Counter(id(module.weight) for module in linear.values())
    found = set()
    for name, module in linear.items():
        try:
            _check_lora_target_modules_mamba(lora, network, name.rpartition(".")[2])
        except ValueError:
            found.add(_in_every_layer(name))
        if users[id(module.weight)] > 1:
            found.add(_in_every_layer(name))
    return found


def _layers_not_plain(small: Any) -> set[str]:
    """Patterns of the names of layers of the class Linear that do something else, as a miniature shows.

    Some are never called: their weights are read past them. An adapter there has no part in the log-probs that are
    trained, but would change them once it is merged. Others give more than the product, as a router that also chooses.
    """
    import torch

    plain: set[str] = set()
    other: set[str] = set()
    linear = _linear_layers(small)

    def look(name: str, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        product = torch.nn.functional.linear(inputs[0], module.weight, module.bias)
        is_plain = isinstance(output, torch.Tensor) and output.shape == product.shape
        kind = plain if is_plain and torch.allclose(output, product) else other
        kind.add(_in_every_layer(name))

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in linear.items()]
    with torch.no_grad():  # many tokens, so that each expert gets some
        small(input_ids=ids_for(small, sequences=16), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {_in_every_layer(name) for name in linear} - (plain - other)


def _linear_layers(network: Any) -> dict[str, Any]:
    from torch import nn

    head = network.get_output_embeddings()
    modules = network.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear) and module is not head}


def _in_every_layer(name: str) -> str:
    """A pattern of a module's name in each layer: `layers.3.mlp.up_proj` to `layers\\.\\d+\\.mlp\\.up_proj`."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", re.escape(name))


def disable_noise(model: PreTrainedModel | PeftModel) -> None:
    """No dropout and no noise: the reference's log-probs must be those of the policy before its first step."""
    import torch
    from peft import PeftModel

    network: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    quiet = copy.deepcopy(network.config)
    configs = {id(network.config): quiet, id(network.config.get_text_config()): quiet.get_text_config()}
    for config in configs.values():
        _set_dropout_to_zero(config)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # what a module applies in a function: OPT's `dropout`, Bloom's `hidden_dropout`, attention's own
        _set_dropout_to_zero(module)
        # what it reads in the config at each call, as Falcon's attention; the network's own config is saved with it
        config = configs.get(id(getattr(module, "config", None)))
        if config is not None and module not in (model, network):
            setattr(module, "config", config)  # noqa: B010 - for type checkers, which know weights and modules only
        # a mixture of experts chooses at random in training; not set to 0: Phi-3.5-MoE uses the value in evaluation too
        if any(isinstance(value, float) and _is_noise(name) for name, value in vars(module).items()):
            module.eval()
            module.train = types.MethodType(_stays_in_eval_mode, module)


def _set_dropout_to_zero(owner: Any) -> None:
    for name, value in list(vars(owner).items()):
        if "drop" in name and isinstance(value, float):
            setattr(owner, name, 0.0)


def _is_noise(name: str) -> bool:
    return "jitter" in name or "noise" in name


def _stays_in_eval_mode(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    return module


@contextmanager
def unsharded(deepspeed: Any) -> Iterator[None]:
    """A network that is loaded in here is whole on each rank, also under ZeRO-3.

    deepspeed: accelerate's plugin, None without DeepSpeed. transformers then does not know of ZeRO-3, so that
    from_pretrained neither shards the weights nor reads the training's batch sizes.
    """
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    config = getattr(deepspeed, "dschf", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)

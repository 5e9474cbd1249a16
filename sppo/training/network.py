"""The network that is trained: what of it is trained, and whether that can be. The preflight asks here too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sppo.command.errors import SPPOError
from sppo.models.loading import add_adapter, empty_network, load_config
from sppo.models.policy import Policy
from sppo.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_network(recipe: Recipe, policy: Policy) -> None:
    """Raise SPPOError for a policy that cannot be trained as asked, without a look at its weights."""
    check_frozen(recipe, policy)
    network = empty_network(policy, recipe.attn_implementation)
    if recipe.use_peft and policy.adapter is None:
        add_adapter(network, policy, lora_and_quantization(recipe)[0])


def check_frozen(recipe: Recipe, policy: Policy) -> None:
    """Raise SPPOError for quantised weights that would have to be trained themselves."""
    if getattr(load_config(policy), "quantization_config", None) is not None and not recipe.use_peft:
        raise SPPOError(
            f"model {policy.weights}: its weights are quantised, so they cannot be trained; pass --use_peft to train "
            "an adapter on them, or take the model whose weights are not"
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


def disable_dropout(model: PreTrainedModel) -> None:
    """No dropout: the reference's log-probs must be those of the policy before its first step."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # what a module applies in a function: OPT's `dropout`, Bloom's `hidden_dropout`, attention's own
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


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

"""Networks from their files: a causal model from safetensors, with its LoRA adapter where it has one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.command.errors import FOREIGN, SPPOError, first_line, out_of_memory, with_code_hint
from sppo.models.policy import Policy

if TYPE_CHECKING:
    import torch

# Nats a token by which rounding weights may change log-probs, in float32 and more, and in half precision. In a merge it
# rounds the sum of base and adapter: adapters of rank 16 on SmolLM2-135M made 0.08 to 0.17 in bfloat16. A merge into
# weights that embedding and head share made 4.3 (tests/test_weights.py).
ROUNDED, ROUNDED_HALF = 1e-3, 0.7


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn whatever transformers and its readers raise for damaged, missing or unknown files into an SPPOError."""
    try:
        yield
    except FOREIGN as error:  # every reader raises its own
        if isinstance(error, SPPOError) or out_of_memory(error):
            raise
        said = " ".join(str(error).split()) if str(error) and isinstance(error, Exception) else first_line(error)
        if "trust_remote_code" in said:  # transformers' advice is to let it run
            said = "it needs Python code that comes with it, which is not run"
        raise SPPOError(f"{what} cannot be loaded: {said}") from None


def disable_cudnn_attention() -> None:
    """Leave cuDNN's attention out: it makes a new plan for each shape, and here almost every batch has a new shape."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def load_config(policy: Policy) -> Any:
    """The policy's config. Raises SPPOError where it cannot be read, or needs code that may not run."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(policy.weights, trust_remote_code=policy.remote_code)
    except (OSError, ValueError, KeyError, SystemExit) as error:
        raise SPPOError(f"model {policy.weights}: its config cannot be loaded: {with_code_hint(error)}") from None


def original_context(config: Any) -> int | None:
    """The context up to which a network turns its heads' numbers in another way than beyond (longrope of Phi-3 and
    Phi-4), by the longest sequence of a batch; None for others."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None


def _attention(config: Any, asked: str) -> dict[str, str]:
    """The attention to load a network with, where it is not transformers' own choice."""
    name = asked or ("eager" if getattr(config, "attn_logit_softcapping", None) else "")
    return {"attn_implementation": name} if name else {}


def check_quantization(config: Any, policy: Policy) -> None:
    """Raise SPPOError for quantised weights that transformers cannot read here: it is asked itself."""
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        from transformers.quantizers.auto import AutoHfQuantizer

        with loading(f"model {policy.weights}: its weights are quantised, so it"):
            AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(device_map=None)


def empty_network(policy: Policy, attn_implementation: str = "") -> Any:
    """The policy's network on torch's meta device: without weights, and without its adapter.

    Raises SPPOError for what load_causal_lm would refuse before it reads the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(policy)
    check_quantization(config, policy)
    options = _attention(config, attn_implementation)
    with loading(f"model {policy.weights}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=policy.remote_code, **options)


def load_causal_lm(
    policy: Policy, dtype: Any, attn_implementation: str = "", merge: bool = True, quantization: Any = None
) -> Any:
    """The policy's network, from safetensors only. `merge`: with its adapter merged in, else without it.

    Gemma-2 gets eager attention: scaled-dot-product attention ignores its soft caps.
    """
    import torch
    from transformers import AutoModelForCausalLM

    disable_cudnn_attention()
    config = load_config(policy)
    check_quantization(config, policy)
    options = _attention(config, attn_implementation)
    if quantization is not None:
        options["quantization_config"] = quantization
    with loading(f"model {policy.weights}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            policy.weights,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=policy.remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them
            **options,
        )
        network, report = loaded
        absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if absent:  # they would be random
            raise SPPOError(f"model {policy.weights}: weights missing or of another shape: {', '.join(absent[:4])}")
    if dtype == torch.float64:
        use_eager_experts(network)
    if policy.adapter is None or not merge:
        return network
    return _merged(_adapted(network, policy.adapter), policy.adapter)


def use_eager_experts(network: Any) -> None:
    """Let a mixture of experts run in float64, in which PyTorch has no grouped product of matrices."""
    if network.get_experts_implementation()[""] == "grouped_mm":
        network.set_experts_implementation("eager")


def _adapted(network: Any, adapter: Path, is_trainable: bool = False) -> Any:
    """`network` with the adapter on top. A missing weight is an error; peft would only warn and leave it at zero."""
    with loading(f"adapter {adapter}"), warnings.catch_warnings():
        from peft import PeftModel

        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(network, adapter, is_trainable=is_trainable)


def _merged(adapted: Any, adapter: Path) -> Any:
    """The network with its adapter merged in. Raises SPPOError where its log-probs would then be others."""
    merged, apart = merge(adapted)
    limit = ROUNDED_HALF if merged.dtype.itemsize == 2 else ROUNDED
    if not apart <= limit:
        raise SPPOError(
            f"adapter {adapter} cannot be merged into its base: the log-probs of the two are {apart:.2g} nats a token "
            f"apart, and rounding makes at most {limit:g}. Use --engine vllm, which does not merge adapters, and leave "
            "out --merge_adapter; or train an adapter on other modules (--lora_target_modules)"
        )
    return merged


def merge(adapted: Any) -> tuple[Any, float]:
    """(the network with its adapter merged in, nats a token by which its log-probs then differ, on average)."""
    wanted = _some_logps(adapted)
    _untie(adapted.get_base_model())
    merged = adapted.merge_and_unload()
    return merged, (_some_logps(merged) - wanted).abs().mean().item()


def _untie(network: Any) -> None:
    """Give the head weights of its own where it shares the embedding's and one of the two has an adapter.

    A merge adds each adapter to the weights of its layer: in shared weights both layers would get both changes.
    """
    from peft.tuners.lora import LoraLayer
    from torch import nn

    ends = [network.get_input_embeddings(), network.get_output_embeddings()]
    if not any(isinstance(end, LoraLayer) for end in ends):
        return
    layers: list[Any] = [end.get_base_layer() if isinstance(end, LoraLayer) else end for end in ends]
    embedding, head = layers
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (network.config, network.config.get_text_config()):
            config.tie_word_embeddings = False


def _some_logps(network: Any) -> Any:
    """(2, 15), float64: log-probs of some tokens in evaluation, to compare two networks by."""
    import torch

    ids = some_ids(network.get_input_embeddings().weight.shape[0]).to(network.device)
    was_training = network.training
    with torch.no_grad():
        logps = token_logps(network.eval(), ids)
    network.train(was_training)
    return logps


def some_ids(vocabulary: int, sequences: int = 2) -> torch.Tensor:
    """(sequences, 16): arbitrary token ids from all over a vocabulary."""
    import torch

    return (torch.arange(16 * sequences) * 7919 % vocabulary).view(sequences, 16)


def token_logps(network: Any, ids: torch.Tensor) -> torch.Tensor:
    """(S, T) -> (S, T - 1), float64: a network's log-prob of each token but the first ones, by a plain forward."""
    import torch

    logits = network(input_ids=ids, use_cache=False).logits[:, :-1]  # (S, T - 1, V)
    return torch.log_softmax(logits.double(), -1).gather(-1, ids[:, 1:, None].to(logits.device)).squeeze(-1)


def add_adapter(network: Any, policy: Policy, new: Any) -> Any:
    """`network` with the LoRA adapter to train: the policy's own where it is one, else `new`, a peft.LoraConfig.

    A new adapter changes nothing before its first step, so either way the policy is the reference then. Raises
    SPPOError for modules that the network does not have.
    """
    from peft import get_peft_model

    if policy.adapter is not None:
        return _adapted(network, policy.adapter, is_trainable=True)
    modules = new.target_modules if isinstance(new.target_modules, str) else ",".join(sorted(new.target_modules))
    try:
        return get_peft_model(network, new)
    except ValueError as error:
        raise SPPOError(f"--lora_target_modules {modules}: {' '.join(str(error).split())}") from None

"""vLLM before it is started: its environment, its precision, and what of a policy it does not take."""

from __future__ import annotations

import os
import re
import typing
from typing import Any, Literal

from sppo.command.errors import SPPOError, first_line
from sppo.models.files import tensors_of, weight_files
from sppo.models.loading import load_config
from sppo.models.policy import Policy
from sppo.store.manifest import version_of


def prepare_vllm(world_size: int) -> None:
    """What vLLM reads from the environment when it is imported; what the user has set there stays.

    In this process where one device is enough: nothing is left behind when it is killed.
    """
    if world_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read by the CPU build only
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def check_vllm(policy: Policy) -> dict[str, Any]:
    """vLLM's options for the policy's adapter; none without one.

    Raises SPPOError for what vLLM does not take, and for weights that it would read otherwise than transformers does.
    """
    known = weight_files(policy.weights)
    stray = sorted(path.name for path in policy.weights.glob("*.safetensors") if path not in known)
    if known and stray and not (policy.weights / "model.safetensors.index.json").exists():
        raise SPPOError(
            f"model {policy.weights}: vLLM reads every .safetensors of a model without an index, so {', '.join(stray)} "
            f"too; move what does not belong to it to another directory, or pass --engine transformers"
        )
    if getattr(load_config(policy), "quantization_config", None) is not None:
        _check_vllm_quantization(policy)
    if policy.adapter is None:
        return {}
    from vllm.config.lora import LoRAConfig, MaxLoRARanks
    from vllm.lora.peft_helper import PEFTHelper

    advice = "pass --engine transformers, or merge it into its base model"
    try:
        helper = PEFTHelper.from_local_dir(str(policy.adapter), None)
        rank = max([helper.r, *helper.rank_pattern.values()])
        ranks = [size for size in typing.get_args(MaxLoRARanks) if size >= rank]  # vLLM has room for these only
        if not ranks:
            raise SPPOError(f"adapter {policy.adapter}: vLLM takes no adapter of rank {rank}; {advice}")
        helper.validate_legal(LoRAConfig(max_lora_rank=min(ranks)))
    except (ValueError, TypeError) as error:
        raise SPPOError(f"adapter {policy.adapter}: vLLM does not take it: {first_line(error)}; {advice}") from None
    path = policy.adapter / "adapter_model.safetensors"
    names = list(tensors_of(path)) if path.exists() else []  # the preflight may leave them on the Hub
    odd = [name for name in names if not re.search(r"\.lora_(embedding_)?[AB]\b|\.base_layer\.weight$", name)]
    if odd:
        raise SPPOError(f"adapter {policy.adapter}: vLLM does not take {odd[0]}; {advice}")
    return {"enable_lora": True, "max_lora_rank": min(ranks)}


def _check_vllm_quantization(policy: Policy) -> None:
    """Raise SPPOError for quantised weights that vLLM does not read on this machine."""
    from vllm.platforms import current_platform

    method = load_config(policy).quantization_config["quant_method"]
    try:
        current_platform.verify_quantization(method)
    except ValueError as error:
        raise SPPOError(f"model {policy.weights}: {first_line(error)}; take the model that is not quantised") from None
    if method == "bitsandbytes" and not version_of("bitsandbytes"):
        raise SPPOError(f"model {policy.weights}: its weights are in bitsandbytes' format; pip install bitsandbytes")


def vllm_dtype(policy: Policy, cpu: bool) -> Literal["auto", "float32", "bfloat16"]:
    """float32 checkpoints (trained without DeepSpeed) run in bfloat16 on a GPU: vLLM's own choice would be float16."""
    stored = str(getattr(load_config(policy), "dtype", None)).removeprefix("torch.")
    if stored == "float32":
        return "float32" if cpu else "bfloat16"
    return "auto"

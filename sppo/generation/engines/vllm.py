"""Responses from vLLM: one pass with n = K, the queue kept full, finished prompts first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from sppo.command.importing import import_networks
from sppo.generation.engines import Finished, Request, Response, prompt_seed
from sppo.models.policy import Policy
from sppo.models.thoughts import Budget
from sppo.models.vllm import check_vllm, cpu_cache, prepare_vllm, vllm_dtype
from sppo.recipe import Recipe

# Prompts waiting in the engine's queue: enough to keep it full, few enough to keep memory flat.
_QUEUE = 1024


def draw(
    policy: Policy, recipe: Recipe, stop_ids: set[int], requests: list[Request], budget: Budget | None = None
) -> Finished:
    """K responses a request, from one engine over --world_size GPUs."""
    longest = max(len(r.token_ids) + r.max_new_tokens for r in requests)
    llm = start(policy, recipe, longest)
    try:
        yield from draw_from(llm, policy, recipe, stop_ids, requests, budget)
    finally:
        end(llm)


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
        "dtype": vllm_dtype(policy, current_platform.is_cpu(), recipe.dtype),
        "load_format": "safetensors",
        "trust_remote_code": policy.remote_code,
        "max_model_len": longest,
    }
    options: dict[str, Any] = {"gpu_memory_utilization": recipe.gpu_memory_utilization, "enable_prefix_caching": True}
    if current_platform.is_cpu():
        config = EngineArgs(**model).create_model_config()
        shards = max(1, recipe.gpus.split(",").count("none"))
        options = {
            "enforce_eager": True,
            # a prefill that is split crashes seeded sampling on the CPU build; recurrent layers' caches ask for it
            "enable_chunked_prefill": False,
            "enable_prefix_caching": not config.has_inner_state,
            "max_num_batched_tokens": max(longest, 2048),
            **cpu_cache(policy, longest, model["dtype"], shards),
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


def end(llm: Any) -> None:
    """End an engine at once.

    The garbage collector would end it at some later time, and close the process groups of the next engine with it.
    """
    llm.llm_engine.engine_core.shutdown()


class _Job(NamedTuple):
    """What the engine is asked at once: all K responses to a request, or the rest of response `k`, which has begun."""

    request: Request
    k: int | None = None
    begun: Sequence[int] = ()


@dataclass
class _Halves:
    """A request whose responses are drawn up to the budget, and of which `left` still go on."""

    responses: list[Response]
    left: int = 0


def draw_from(
    llm: Any, policy: Policy, recipe: Recipe, stop_ids: set[int], requests: list[Request], budget: Budget | None = None
) -> Finished:
    """One pass with n = K: the engine's queue is kept full from the first request to the last.

    With a budget the pass draws so many tokens. Then each response goes on by itself, with the end of its thought
    behind it where that has not ended. vLLM's own thinking_token_budget finds marks of several tokens only where they
    are tokenised as they are alone, and says nothing of the others.
    """
    engine, firsts, rests = llm.llm_engine, map(_Job, requests), deque[_Job]()
    running: dict[str, _Job] = {}
    halves: dict[str, _Halves] = {}
    ask, numbers = _asker(llm, policy, recipe, stop_ids, budget), count()
    while True:
        while len(running) < _QUEUE and (job := rests.popleft() if rests else next(firsts, None)):
            running[name := str(next(numbers))] = job
            ask(name, job)
        if not running:
            return
        for output in engine.step():
            if not output.finished:
                continue
            job = running.pop(output.request_id)
            found = [_response(o) for o in sorted(output.outputs, key=lambda o: o.index)]
            key = job.request.prompt_id
            if job.k is None:
                halves[key] = _Halves(found)
                rests += _rests(job.request, halves[key], budget)
            else:
                half = halves[key]
                half.responses[job.k] = _joined(half.responses[job.k], found[0])
                half.left -= 1
            if not halves[key].left:
                yield job.request, halves.pop(key).responses


def _asker(
    llm: Any, policy: Policy, recipe: Recipe, stop_ids: set[int], budget: Budget | None
) -> Callable[[str, _Job], None]:
    """The function that puts a job of that name into the engine's queue."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    lora = LoRARequest("policy", 1, str(policy.adapter)) if policy.adapter else None

    def ask(name: str, job: _Job) -> None:
        request, is_rest = job.request, job.k is not None
        seed = prompt_seed(request.seed, f"the rest of {job.k}") if is_rest else request.seed
        room = request.max_new_tokens - len(job.begun)
        params = SamplingParams(
            n=1 if is_rest else recipe.pairs,
            temperature=recipe.temperature,
            top_p=recipe.top_p,
            seed=seed if recipe.prompt_seeds else None,  # vLLM gives sample k the seed + k
            max_tokens=min(room, budget.tokens) if budget and not is_rest else room,
            stop_token_ids=sorted(stop_ids),
            detokenize=False,
            logprobs=0 if request.logps else None,  # 0: of the drawn token alone
            output_kind=RequestOutputKind.FINAL_ONLY,  # all K samples of a prompt at once
        )
        (prompt,) = llm.renderer.render_cmpl([TokensPrompt(prompt_token_ids=[*request.token_ids, *job.begun])])
        llm.llm_engine.add_request(name, prompt, params, lora_request=lora)

    return ask


def _rests(request: Request, half: _Halves, budget: Budget | None) -> Iterator[_Job]:
    """The jobs that go on with the responses which the budget has stopped, after the end of their thought if need be.

    Counts them in `half`, and puts these ends behind its responses.
    """
    for k, response in enumerate(half.responses):
        ids, room = response.token_ids, request.max_new_tokens
        if not budget or response.finish_reason != "length" or len(ids) >= room:
            continue
        if ending := budget.ending(request.token_ids, ids, room):
            half.responses[k] = Response([*ids, *ending], "length", None, is_thought_cut=True)
        half.left += 1
        yield _Job(request, k, half.responses[k].token_ids)


def _joined(begun: Response, rest: Response) -> Response:
    logps = None if begun.logps is None or rest.logps is None else [*begun.logps, *rest.logps]
    return Response([*begun.token_ids, *rest.token_ids], rest.finish_reason, logps, begun.is_thought_cut)


def _response(output: Any) -> Response:
    ids = list(output.token_ids)
    steps = output.logprobs
    logps = None if steps is None else [step[token].logprob for step, token in zip(steps, ids, strict=True)]
    return Response(ids, output.finish_reason, logps)

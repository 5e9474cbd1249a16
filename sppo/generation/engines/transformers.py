"""Responses from transformers' generate, where vLLM is not installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sppo.command.errors import SPPOError
from sppo.generation.engines import Finished, Request, Response
from sppo.models.loading import load_causal_lm
from sppo.models.miniature import ignores_padding, knows_float64, miniature_of, refuse_not_causal
from sppo.models.policy import Policy
from sppo.models.thoughts import Budget
from sppo.recipe import Recipe

if TYPE_CHECKING:
    import torch

# Sequences in one batch, and the multiple that prompts are padded to.
BATCH, _BUCKET = 64, 16
# Weights up to this many bytes run in float64 on a CPU; larger ones in float32, for memory's sake.
DOUBLE = 2 << 30


def draw(
    policy: Policy, recipe: Recipe, stop_ids: set[int], requests: list[Request], budget: Budget | None = None
) -> Finished:
    """K responses a request, on one device: --world_size is vLLM's.

    Sampling is inverse-CDF on one uniform number per (prompt seed, k, position), so which batch a prompt
    stands in decides nothing but the last bits of its logits. On a CPU small models run in float64, where those bits
    are too small to turn a draw: the responses are the same whatever the shards, the batches and the threads.
    """
    import torch
    from transformers import GenerationConfig

    small = miniature_of(policy)
    if small is not None:
        refuse_not_causal(small)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = "auto"
    if device == "cpu":
        is_double = policy.bytes() <= DOUBLE and (small is None or knows_float64(small))
        dtype = torch.float64 if is_double else torch.float32
    network = load_causal_lm(policy, dtype).to(device).eval()
    network.generation_config = GenerationConfig()  # sampling is the recipe's alone
    network.config.get_text_config().output_router_logits = False  # of a training of experts; generate() stumbles on it
    width = max(1, BATCH // recipe.pairs)
    # Eager attention (soft caps) in float64 makes NaN of a row that is padding alone, and a recurrent network may read
    # padding as text: no padding there, nor where it is not known.
    may_pad = network.config._attn_implementation != "eager" and small is not None and ignores_padding(small)
    bucket = _BUCKET if may_pad else 1
    buckets: dict[int, list[Request]] = {}
    for request in requests:
        buckets.setdefault(-(-len(request.token_ids) // bucket) * bucket, []).append(request)
    for length, members in sorted(buckets.items()):
        left = list(members)
        while left:
            try:
                finished = _batch(network, recipe, stop_ids, left[:width], length, budget)
            except torch.OutOfMemoryError:
                if width == 1:
                    raise
                width //= 2  # no draw depends on the batch it is made in
                print(f"generate: a batch does not fit into the GPU's memory; going on with {width} prompts in each")
                continue
            left = left[width:]
            yield from finished


def _batch(
    network: Any, recipe: Recipe, stop_ids: set[int], batch: list[Request], length: int, budget: Budget | None
) -> list[tuple[Request, list[Response]]]:
    """The responses of prompts that are padded, on the left, to `length` tokens."""
    import torch
    from transformers import GenerationConfig

    pad = min(stop_ids)
    each = [r for r in batch for _ in range(recipe.pairs)]
    rows = [[pad] * (length - len(r.token_ids)) + list(r.token_ids) for r in each]
    mask = [[0] * (length - len(r.token_ids)) + [1] * len(r.token_ids) for r in each]
    longest = max(r.max_new_tokens for r in batch)
    sampler = _Sampler(recipe, batch, length, longest, budget)
    with torch.inference_mode():
        output = network.generate(
            torch.tensor(rows, device=network.device),  # (B * K, length)
            attention_mask=torch.tensor(mask, device=network.device),
            generation_config=GenerationConfig(
                max_new_tokens=longest, do_sample=False, eos_token_id=sorted(stop_ids), pad_token_id=pad
            ),
            logits_processor=[sampler],
        )
    drawn, finished = output[:, length:].tolist(), []
    for i, request in enumerate(batch):
        answers = drawn[i * recipe.pairs : (i + 1) * recipe.pairs]
        responses = [_finish(ids[: request.max_new_tokens], stop_ids) for ids in answers]
        for k, response in enumerate(responses):
            row = i * recipe.pairs + k
            response.is_thought_cut = row in sampler.endings
            if request.logps and not response.is_thought_cut:
                response.logps = sampler.logps(row)[: len(response.token_ids)]
        finished.append((request, responses))
    return finished


def _finish(ids: list[int], stop_ids: set[int]) -> Response:
    for position, token in enumerate(ids):
        if token in stop_ids:
            return Response(ids[: position + 1], "stop")
    return Response(ids, "length")


class _Sampler:
    """A logits processor that draws the token itself: temperature, top-p, then the inverse CDF.

    `endings`: by the row of the batch, the tokens that end a thought for which the budget is used up. They stand where
    drawn ones would, so no other draw changes.
    """

    def __init__(
        self, recipe: Recipe, requests: list[Request], prompt_length: int, longest: int, budget: Budget | None = None
    ) -> None:
        import numpy as np
        import torch

        self.temperature, self.top_p, self.prompt_length = recipe.temperature, recipe.top_p, prompt_length
        uniform = [
            np.random.Generator(np.random.Philox(key=[r.seed, k])).random(longest)
            for r in requests
            for k in range(recipe.pairs)
        ]
        self.uniform = torch.from_numpy(np.stack(uniform))  # (B, longest) float64
        self.budget, self.endings = budget, dict[int, list[int]]()
        self.prompts = [r.token_ids for r in requests for _ in range(recipe.pairs)]
        self.rooms = [r.max_new_tokens for r in requests for _ in range(recipe.pairs)]
        self.drawn: list[torch.Tensor] | None = [] if any(r.logps for r in requests) else None  # a (B,) for each step

    def logps(self, row: int) -> list[float]:
        """The log-probabilities of the tokens drawn in a row of the batch, before temperature and top_p."""
        return [step[row].item() for step in self.drawn or ()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        place = input_ids.shape[1] - self.prompt_length
        u = self.uniform[:, place, None].to(scores.device)  # (B, 1)
        temperature = self.temperature or 1e-9  # 0: all of the mass on the likeliest token
        probs, order = torch.softmax(scores.double() / temperature, -1).sort(dim=-1, descending=True, stable=True)
        cumulative = probs.cumsum(-1)  # (B, V)
        if not cumulative[:, -1].isfinite().all():
            raise SPPOError("the model's logits are not finite; its weights or its precision are broken")
        nucleus = (cumulative - probs < self.top_p).sum(-1, keepdim=True)  # tokens kept
        mass = cumulative.gather(-1, nucleus - 1)
        rank = torch.searchsorted(cumulative, u * mass, right=True).minimum(nucleus - 1)
        token = self._with_endings(order.gather(-1, rank), input_ids, place)
        if self.drawn is not None:
            self.drawn.append(torch.log_softmax(scores.double(), -1).gather(-1, token).squeeze(-1).cpu())
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)

    def _with_endings(self, token: torch.Tensor, input_ids: torch.Tensor, place: int) -> torch.Tensor:
        """The tokens (B, 1) for a place, with those that end a thought in the place of drawn ones."""
        if self.budget is None or place < self.budget.tokens:
            return token
        if place == self.budget.tokens:
            for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
                if ending := self.budget.ending(self.prompts[row], ids, self.rooms[row]):
                    self.endings[row] = ending
        for row, ending in self.endings.items():
            if place - self.budget.tokens < len(ending):
                token[row] = ending[place - self.budget.tokens]
        return token

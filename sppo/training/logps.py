"""Log-probabilities of responses, without logits for the whole vocabulary at every position.

Only positions that predict a response token go through the head, in chunks whose logits are made, read and dropped,
and made again in the backward pass. That is the lean forward; `response_logps` is the plain one that it is checked
against.

`trl.trainer.add_fused_lm_head` does the same with a Triton kernel on GPUs; it is not used, because its path here could
not be checked on a GPU.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sppo.training.ranks import sum_over_ranks

if TYPE_CHECKING:
    from sppo.training.batches import Batch

CHUNK_TOKENS = 1024  # tokens in one chunk: 0.5 GB of float32 logits for a vocabulary of 128k


@dataclass
class Forward:
    """How rows go through a network, the same way on all ranks.

    chunks is given and never derived from a batch: under ZeRO-3 each call of the head gathers its weight on all ranks,
    so ranks with different numbers of chunks would wait for ever.
    """

    batch_size: int  # rows of a micro-batch, on average where they go by length
    chunks: int  # in which the head makes a micro-batch's logits
    is_lean: bool  # whether the network has the forward of add_lean_forward

    def logps(self, network: Any, batch: Batch) -> torch.Tensor:
        """(S,), float32: log-probability of each of the batch's responses, summed over its tokens."""
        input_ids, positions = batch["input_ids"], batch["positions"]
        if self.is_lean:
            groups = {"groups": batch["groups"], "widths": batch["widths"]}
            return network(input_ids=input_ids, positions=positions, chunks=self.chunks, **groups)
        output = network(input_ids=input_ids, attention_mask=batch["attention_mask"], use_cache=False)
        return response_logps(output.logits, input_ids, positions)

    @torch.no_grad()
    def agrees_with_plain(self, network: Any, batch: Batch, accelerator: Accelerator) -> bool:
        """Whether the lean log-probs are the plain ones, on all ranks together: those of a forward with a mask."""
        was_training = network.training
        network.eval()
        lean = self.logps(network, batch).float()
        plain = replace(self, is_lean=False).logps(network, batch).float()
        network.train(was_training)
        apart = ((lean - plain).abs() / tokens_of(batch).sqrt()).max()
        return sum_over_ranks(accelerator, apart).item() <= rounding(accelerator) * accelerator.num_processes


def tokens_of(batch: Batch) -> torch.Tensor:
    """(S,): tokens of each of a batch's responses."""
    rows, width = batch["input_ids"].shape
    return torch.bincount(batch["positions"] // width, minlength=rows)


def rounding(accelerator: Accelerator) -> float:
    """Nats by which rounding may move a response's log-prob, divided by the square root of its tokens.

    The errors of single tokens are independent, so that their sum grows as the root. In float32 rounding made 2e-7, a
    router's noise of 0.1 made 0.05 and dropout of 0.1 made 0.3 (tests/test_weights.py); in bfloat16 rounding made 0.03
    (SmolLM2-135M).
    """
    return 2e-3 if accelerator.mixed_precision == "no" else 0.15


def response_logps(logits: torch.Tensor, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Log-probability of each row's response, summed over its tokens, in float32: the plain definition, (S,).

    logits: (S, T, V); input_ids: (S, T); positions: (P,), places in the flattened (S, T) whose next token is a
    response's.
    """
    rows, width = input_ids.shape
    targets = input_ids.reshape(-1)[positions + 1]
    logps = torch.log_softmax(logits.reshape(rows * width, -1)[positions].float(), -1)
    return _sums(logps.gather(-1, targets[:, None]).squeeze(-1), positions, rows, width)


def _sums(logps: torch.Tensor, positions: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """(P,) to (S,). Through a padded table, whose sums come out the same each time; index_add's on a GPU do not."""
    return logps.new_zeros(rows * width).index_copy(0, positions, logps).view(rows, width).sum(-1)


def _hidden_states(
    backbone: Any, input_ids: torch.Tensor, groups: Sequence[torch.Tensor], widths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states of all groups' tokens, (N, H); where in them each of the S sequences begins, (S,)).

    Without attention_mask: padding is on the right, where causal attention never looks, and attention that needs no
    mask is the fast one.
    """
    starts, states, start = input_ids.new_zeros(len(input_ids)), [], 0
    for group, width in zip(groups, widths, strict=True):
        hidden = backbone(input_ids[group, :width], use_cache=False).last_hidden_state  # (s, w, H)
        states.append(hidden.flatten(0, 1))
        starts[group] = torch.arange(len(group), device=group.device) * width + start
        start += len(states[-1])
    return torch.cat(states), starts


def add_lean_forward(network: Any) -> bool:
    """Let `network(input_ids, positions, chunks, groups, widths)` return response log-probs, (S,), float32.

    input_ids: (S, T), padded on the right. positions, groups, widths: as in batches.Batch. chunks: see Forward.

    Any other call is the network's own forward. Call it before PEFT, DDP or DeepSpeed wrap the network. Returns
    False, and changes nothing, where the architecture has no backbone of its own or no head.
    """
    name = next((name for name in (network.base_model_prefix, "model") if name in network._modules), None)
    if name is None or network.get_output_embeddings() is None:
        return False
    own = network.forward

    def chunk_logps(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(P / chunks, H), (P / chunks,) -> (P / chunks,), float32."""
        logits = _own_logits(network, name, own, hidden)  # (P / chunks, V)
        return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")

    def forward(self: Any, *args: Any, positions: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if positions is None:
            return own(*args, **kwargs)
        input_ids = kwargs["input_ids"]  # (S, T)
        rows, width = input_ids.shape
        hidden, starts = _hidden_states(getattr(self, name), input_ids, kwargs["groups"], kwargs["widths"])
        hidden = hidden.index_select(0, starts[positions // width] + positions % width)  # (P, H)
        targets = input_ids.reshape(-1)[positions + 1]

        logps = []
        chunks = kwargs["chunks"]
        for chunk in zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
            if torch.is_grad_enabled():  # the chunk's logits are made again in the backward pass
                logps.append(checkpoint(chunk_logps, *chunk, use_reentrant=False, preserve_rng_state=False))
            else:
                logps.append(chunk_logps(*chunk))
        return _sums(torch.cat(logps), positions, rows, width)

    network.forward = types.MethodType(forward, network)
    return True


def _own_logits(network: Any, backbone: str, own: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
    """(P, H) -> (P, V): the logits that the network's own forward makes of hidden states.

    So whatever it does behind its backbone is done: scales, soft caps, layers before the head. For the call, its
    backbone is replaced by one that returns `hidden`: an attribute of the instance hides the module of the same name.
    """
    vars(network)[backbone] = _Backbone(getattr(network, backbone), hidden[None])
    try:
        return own(input_ids=hidden.new_zeros((1, len(hidden)), dtype=torch.long), use_cache=False).logits[0]
    finally:
        del vars(network)[backbone]


class _Backbone:
    """A network's backbone that gives the same hidden states, (1, P, H), for whatever it is asked."""

    def __init__(self, backbone: Any, hidden: torch.Tensor) -> None:
        self.backbone, self.hidden = backbone, hidden

    def __call__(self, *_: Any, **__: Any) -> _Output:
        return _Output(self.hidden)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.backbone, name)
        return self if isinstance(found, PreTrainedModel) else found  # OPT asks its backbone's decoder


class _Output:
    """A backbone's output with hidden states alone: nothing else, like a cache or a router's choices."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None

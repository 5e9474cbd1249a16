"""Log-probabilities of responses, without logits for the whole vocabulary at every position.

Only positions that predict a response token go through the head, in chunks whose logits are made, read and dropped,
and made again in the backward pass. The number of chunks is given, never derived from a batch: under ZeRO-3 each call
of the head gathers its weight on all ranks, so ranks with different numbers of chunks would wait for ever.

`trl.trainer.add_fused_lm_head` does the same with a Triton kernel on GPUs; it is not used, because its path here could
not be checked on a GPU.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 1024  # tokens in one chunk: 0.5 GB of float32 logits for a vocabulary of 128k


def response_logps(logits: torch.Tensor, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Log-probability of each row's response, summed over its tokens, in float32: the plain definition, (S,).

    logits: (S, T, V); input_ids: (S, T); positions: (P,), places in the flattened (S, T) whose next token is a
    response's.
    """
    rows, width = input_ids.shape
    targets = input_ids.reshape(-1)[positions + 1]
    logps = torch.log_softmax(logits.reshape(rows * width, -1)[positions].float(), -1)
    return _sums(logps.gather(-1, targets[:, None]).squeeze(-1), positions, rows, width)


def _token_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(P, V), (P,) -> (P,), float32."""
    return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _sums(logps: torch.Tensor, positions: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """(P,) to (S,). Through a padded table, whose sums come out the same each time; index_add's on a GPU do not."""
    return logps.new_zeros(rows * width).index_copy(0, positions, logps).view(rows, width).sum(-1)


def _read(
    backbone: Any, input_ids: torch.Tensor, runs: Sequence[torch.Tensor], widths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states of all that is read, (N, H); where in them each of the S sequences begins, (S,)).

    Without attention_mask: padding is on the right, where causal attention never looks, and attention that needs no
    mask is the fast one.
    """
    starts, made, start = input_ids.new_zeros(len(input_ids)), [], 0
    for run, width in zip(runs, widths, strict=True):
        hidden = backbone(input_ids[run, :width], use_cache=False).last_hidden_state  # (s, w, H)
        made.append(hidden.flatten(0, 1))
        starts[run] = torch.arange(len(run), device=run.device) * width + start
        start += len(made[-1])
    return torch.cat(made), starts


def add_lean_forward(network: Any) -> bool:
    """Let `network(input_ids, positions, chunks)` return response log-probs, (S,), float32.

    input_ids: (S, T), padded on the right. positions: as in response_logps. runs, widths: see TrainingSet.batch;
    without them all rows go through the network together.

    Any other call is the network's own forward. Call it before PEFT, DDP or DeepSpeed wrap the network. Returns
    False, and changes nothing, where the architecture does not say how its logits come about.
    """
    backbone = getattr(network, network.base_model_prefix, None)
    if backbone is None or backbone is network or network.get_output_embeddings() is None:
        return False
    own = network.forward
    config = network.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = _logit_scale(config)

    def chunk_logps(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = network.get_output_embeddings()(hidden)  # (P / chunks, V)
        if scale != 1:
            logits = logits * scale
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        return _token_logps(logits, targets)

    def forward(
        self: Any, *args: Any, positions: torch.Tensor | None = None, chunks: int = 1, runs: Any = None,
        widths: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if positions is None:
            return own(*args, **kwargs)
        input_ids = kwargs["input_ids"]  # (S, T)
        rows, width = input_ids.shape
        runs, widths = runs or [torch.arange(rows, device=input_ids.device)], widths or [width]
        hidden, starts = _read(getattr(self, self.base_model_prefix), input_ids, runs, widths)
        hidden = hidden.index_select(0, starts[positions // width] + positions % width)  # (P, H)
        targets = input_ids.reshape(-1)[positions + 1]
        parts = zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
        if torch.is_grad_enabled():
            made = [checkpoint(chunk_logps, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        else:
            made = [chunk_logps(*part) for part in parts]
        return _sums(torch.cat(made), positions, *input_ids.shape)

    network.forward = types.MethodType(forward, network)
    return True


def _logit_scale(config: Any) -> float:
    """What the architecture multiplies its logits by (Cohere multiplies, Granite divides)."""
    if getattr(config, "logit_scale", None) is not None:
        return config.logit_scale
    return 1 / config.logits_scaling if getattr(config, "logits_scaling", None) is not None else 1

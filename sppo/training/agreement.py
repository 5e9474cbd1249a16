"""Whether the engine that drew the responses and the trainer mean the same policy, by the log-probs that both gave."""

from __future__ import annotations

import numpy as np
import torch

from sppo.schema import AGREEING
from sppo.training.data import TrainingSet


def engine_agreement(reference: torch.Tensor, data: TrainingSet) -> dict[str, float]:
    """How far apart the engine's and the trainer's log-probs are; empty where the engine's are not known.

    reference: (S,), the trainer's log-probs. The difference of a response's two log-probs is divided by its tokens:
    `mean_difference` and `largest_difference` are of its absolute value, in nats a token. `kl` is the mean of the
    signed differences over all tokens, an estimate of KL(engine || trainer), because the engine drew them.
    """
    known = np.flatnonzero(np.isfinite(data.drawn_logps))
    if not len(known):
        return {}
    tokens = np.array([len(response) for row in data.responses for response in row])[known]
    apart = data.drawn_logps[known] - reference.double().cpu().numpy()[known]  # (n,)
    each = np.abs(apart) / tokens
    found = {"mean_difference": each.mean(), "largest_difference": each.max(), "kl": apart.sum() / tokens.sum()}
    rounded = {name: float(f"{value:.3g}") for name, value in found.items()}
    return {"responses": len(known), "tokens": int(tokens.sum()), **rounded}


def describe_agreement(found: dict[str, float]) -> str:
    """The agreement as a line for the log: a warning where it is worse than AGREEING."""
    apart = f"{found['mean_difference']:.2g} nats a token apart on average over {found['responses']} responses"
    if found["mean_difference"] <= AGREEING:
        return f"the engine's and the trainer's log-probs are {apart}"
    return (
        f"warning: the engine that drew the responses and the trainer disagree about the policy: their log-probs are "
        f"{apart}; at most {AGREEING} is usual. The loss compares with the trainer's, so it learns from responses "
        "of another policy. Usual reasons: another precision or attention, quantised weights, a template or an adapter "
        "that one of the two does not apply"
    )

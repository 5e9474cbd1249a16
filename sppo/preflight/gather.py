"""Look at a run once, before it starts: its machines, model, prompts, ranker, and the work that is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sppo.command.errors import SPPOError
from sppo.launch.cores import main_memory
from sppo.preflight import generation, hours, machine, ranking, training
from sppo.preflight.facts import Facts, Machines, Run

T = TypeVar("T")


def gather(run: Run) -> Facts:
    """The Facts of a run, in the order in which one needs another. What cannot be learned is among their troubles."""
    troubles: dict[str, list[str]] = {}

    def learn(group: str, look: Callable[..., T], *needs: Any) -> T | None:
        try:
            return look(*needs)
        except Exception as error:  # noqa: BLE001 - one trouble must not hide the others
            troubles.setdefault(group, []).append(trouble(error, look))
            return None

    facts = Facts(run, Machines(main_memory()), troubles=troubles)
    facts.machines = learn("machines" if run.cluster else "GPUs", machine.look_at_machines, run) or facts.machines

    facts.model = model = learn("model", generation.look_at_model, run)
    if model is not None:
        facts.tokenizer = learn("chat template", model.policy.tokenizer)
    if run.trains:
        facts.training = learn("training", training.look_at_training, run)

    facts.prompts = learn("prompts", generation.read_prompts, run, model, facts.tokenizer) or []
    if run.reports:
        facts.held_out = learn("report", generation.read_held_out, run, model, facts.tokenizer)
    facts.work = learn("plan", hours.count_work, run, facts.prompts, facts.training) or []
    if run.generates:
        facts.ranker = learn("ranker", ranking.look_at_ranker, run)
    return facts


def trouble(error: Exception, function: Callable[..., Any]) -> str:
    """What to say of an error in looking or checking. Any that is not an SPPOError is a fault of the preflight."""
    if isinstance(error, SPPOError):
        return str(error)
    said = f"{getattr(function, '__name__', function)}: {type(error).__name__}: {error}"
    return f"this check failed itself ({said}); --skip_preflight starts without the preflight"

"""What the preflight's checks say, and what they know of the run that is asked for.

The checks stand beside what they check (generation/checks.py, ranking/checks.py, ...). Each is a function of a Run that
yields Findings. What a check learns, it leaves in the Run for the checks behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sppo.launch.cores import main_memory
from sppo.models.policy import Policy
from sppo.models.shape import Shape
from sppo.recipe import Recipe
from sppo.schema import Message
from sppo.store.files import has_begun

RUNTIME = 2 << 30  # bytes of a GPU that CUDA, kernels and buffers take beside what is counted
TYPICAL_RESPONSE = 400  # tokens; a guess at a chat model's usual response


@dataclass
class Finding:
    """What a check found. ok: as it should be; note: the run goes on, but look; no: the run would fail."""

    level: Literal["ok", "note", "no"]
    text: str


Findings = Iterator[Finding]


def ok(text: str) -> Finding:
    return Finding("ok", text)


def note(text: str) -> Finding:
    return Finding("note", text)


def no(text: str) -> Finding:
    return Finding("no", text)


@dataclass
class Iteration:
    """Which parts of an iteration are still to be done."""

    number: int
    data: bool
    training: bool
    report: bool


@dataclass
class PromptSet:
    """The prompts of one iteration, as generation will see them."""

    total: int
    usable: int
    lengths: list[int]  # tokens of each prompt that can be answered; empty where there is no tokenizer
    rooms: list[int]  # tokens that each response may have
    conversations: list[list[Message]]
    every: int = 1  # of a large set only every so-manieth prompt is looked at, and counts are multiplied

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)


@dataclass
class Load:
    """The work of one iteration, as far as it is not done."""

    iteration: int
    generate: bool
    train: bool
    prompts: int  # that can be answered
    prompt_tokens: int
    longest_prompt: int
    most_tokens: int  # in all responses, if each is as long as it may be
    rows: int  # pairs to train on, at most
    steps: int  # of the optimiser

    def responses(self, pairs: int) -> int:
        return self.prompts * pairs if self.generate else 0

    def comparisons(self, pairs: int) -> int:
        """Ordered pairs."""
        return self.prompts * pairs * (pairs - 1) if self.generate else 0

    def response_tokens(self, recipe: Recipe) -> int:
        """In all responses, as they usually are."""
        return min(self.most_tokens, self.prompts * recipe.pairs * TYPICAL_RESPONSE)


@dataclass
class Run:
    """The run that is asked for, and what the checks have learned of it."""

    recipe: Recipe
    name: str
    run_dir: Path
    gpus: list[str]  # as sppo.launch.devices gives them: an empty name is the CPU
    world_size: int
    accelerate_config: str
    left: list[Iteration]
    machines: int = 1  # that train together, each with `gpus`
    cluster: Any = None  # the launcher of a cluster; None: this machine
    memory: int = 0  # free bytes of main memory of the smallest machine; 0: look at this one
    cards: dict[str, tuple[int, int]] = field(default_factory=dict)  # (all, free) bytes of each GPU
    policy: Policy | None = None
    loads_model: bool = False  # whether generation finds nothing wrong with the policy
    shape: Shape | None = None
    tokenizer: Any = None
    sets: dict[int, PromptSet] = field(default_factory=dict)  # of the iterations whose data is to be made
    downloads: dict[str, int] = field(default_factory=dict)  # bytes, by what they are of
    # (accelerate config, processes, steps of accumulation or 0)
    training: tuple[dict[str, Any], int, int] | None = None
    ranker_parameters: int = 0
    ranker_reads_pairs: bool = True
    rate: float = 0.0  # FLOPs a second, all devices together
    loads: list[Load] = field(default_factory=list)

    @property
    def cpu(self) -> bool:
        return "" in self.gpus

    @property
    def has_begun(self) -> bool:
        """Whether this run was started before: then what passes by itself must not end it."""
        return has_begun(self.run_dir)

    @property
    def main_memory(self) -> int:
        return self.memory or main_memory()

    @property
    def makes_data(self) -> bool:
        return any(i.data for i in self.left)

    @property
    def trains(self) -> bool:
        return any(i.training for i in self.left)

    @property
    def generates(self) -> bool:
        return any(i.data or i.report for i in self.left)


def fits(what: str, certain: float, more: float, room: float, parts: str, advice: str) -> Finding:
    """`no` where what is certain does not fit into `room`, `note` where the estimate on top does not. In bytes."""
    text = f"{what}: {size(certain)} of {parts.format(size(more))}; {size(room)} can be had"
    if certain > room:
        return no(f"{text}. {advice}")
    return note(f"{text}: it may not fit. {advice}") if certain + more > room else ok(text)


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def many(number: int, what: str) -> str:
    """1 step, 2 steps, 2 processes."""
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('s') else 's'}"


def parameters_text(number: int) -> str:
    """A number of parameters for a person."""
    billions = number >= 5e7
    return f"{number / (1e9 if billions else 1e6):.3g} {'billion' if billions else 'million'} parameters"

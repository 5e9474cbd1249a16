"""The run that is asked for, and what the preflight's looks learn of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from sppo.launch.devices import CPU
from sppo.models.policy import Policy
from sppo.models.shape import Shape
from sppo.recipe import Recipe
from sppo.schema import Message

TYPICAL_RESPONSE = 400  # tokens; a guess at a chat model's usual response


@dataclass
class Iteration:
    """Which parts of an iteration are still to be done."""

    number: int
    data: bool
    training: bool
    report: bool


@dataclass(frozen=True)
class Run:
    """The run that is asked for."""

    recipe: Recipe
    gpus: list[str]  # of each machine, as sppo.launch.devices gives them
    left: list[Iteration]
    machines: int = 1  # that train together
    cluster: Any = None  # the launcher of a cluster; None: this machine

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run_dir)

    @property
    def cpu(self) -> bool:
        return CPU in self.gpus

    @property
    def makes_data(self) -> bool:
        return any(i.data for i in self.left)

    @property
    def trains(self) -> bool:
        return any(i.training for i in self.left)

    @property
    def reports(self) -> bool:
        return any(i.report for i in self.left)

    @property
    def generates(self) -> bool:
        return self.makes_data or self.reports


@dataclass
class Machines:
    """The machine that the run is on, or the machines of its cluster."""

    memory: int  # free bytes of main memory, of the machine with the least
    cards: dict[str, tuple[int, int]] = field(default_factory=dict)  # (all, free) bytes of each GPU that is known
    rate: float = 0.0  # FLOPs a second of matrix products, all devices together; 0: not known


@dataclass
class Model:
    """The model that the first iteration with work left starts from."""

    policy: Policy
    shape: Shape
    to_download: int  # bytes
    loads: bool  # whether generation can load it


@dataclass
class PromptSet:
    """One set of prompts, as generation will see it."""

    source: str
    iterations: list[int]  # that draw from it; none for the held-out prompts
    total: int = 0
    usable: int = 0
    skipped: list[str] = field(default_factory=list)  # the reason of each that cannot be answered
    lengths: list[int] = field(default_factory=list)  # tokens of each that can; none where there is no tokenizer
    rooms: list[int] = field(default_factory=list)  # tokens that each response may have
    conversations: list[list[Message]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)  # of all that are text; conversations are of some of them
    asked: list[str] = field(default_factory=list)  # of the conversations
    extra: dict[int, int] = field(default_factory=dict)  # by iteration: each prompt's answers of other models
    every: int = 1  # of a large set only every n-th prompt is looked at, and counts are multiplied by n

    @property
    def which(self) -> str:
        return f"iteration {', '.join(map(str, self.iterations))}"


@dataclass
class Ranker:
    """The ranker, fetched. `backend`: its module in sppo/rankers. `parameters`: 0 where it is no network here."""

    recipe: Recipe
    backend: ModuleType
    kind: str
    parameters: int = 0
    on_disk: int = 0  # bytes


@dataclass
class Work:
    """The work of one iteration, as far as it is not done."""

    iteration: Iteration
    prompts: int  # that can be answered
    most_tokens: int  # in all responses, if each is as long as it may be
    rows: int  # pairs to train on, at most
    prompt_tokens: int = 0
    extra: int = 0  # each prompt's answers of other models
    steps: int = 0  # of the optimiser; 0 where the global batch does not come out even

    def response_tokens(self, recipe: Recipe) -> int:
        """In all responses, as they usually are."""
        return min(self.most_tokens, self.prompts * recipe.pairs * TYPICAL_RESPONSE)

"""What the preflight's checks look at: the run that is asked for, and what gather.py has learned of it.

A check is a function of the Facts that yields Findings. It changes nothing in them, so the checks have no order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sppo.launch.devices import CPU, GPU
from sppo.models.policy import Policy
from sppo.models.shape import Shape
from sppo.recipe import Recipe
from sppo.schema import Message
from sppo.store.files import has_begun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUNTIME = 2 << 30  # bytes of a GPU that CUDA, kernels and buffers take beside what is counted
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
    def has_begun(self) -> bool:
        """Whether this run was started before: then what passes by itself must not end it."""
        return has_begun(self.run_dir)

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
    rate_trouble: str = ""  # why PyTorch cannot use a GPU
    listed: list[GPU] = field(default_factory=list)  # what nvidia-smi lists on this machine
    nodes: list[dict[str, Any]] = field(default_factory=list)  # what was found on each machine of a cluster
    node_troubles: list[str] = field(default_factory=list)


@dataclass
class Model:
    """The model that the first iteration with work left starts from."""

    name: str
    kind: str  # config.json's model_type
    policy: Policy
    shape: Shape
    to_download: int  # bytes
    refused: str  # why generation could not load it; empty where it can


@dataclass
class Training:
    """The processes that would train."""

    config_name: str
    config: dict[str, Any]  # accelerate's
    processes: int
    accumulation: int  # steps; 0 where the global batch does not come out even
    uneven: str  # why not; else empty


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
    every: int = 1  # of a large set only every n-th prompt is looked at, and counts are multiplied by n
    unreadable: str = ""  # why nothing of this is known

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)


@dataclass
class Ranker:
    """The ranker, fetched. `backend`: its module in sppo/rankers. `parameters`: 0 where it is no network here."""

    recipe: Recipe
    backend: ModuleType
    kind: str
    parameters: int = 0
    on_disk: int = 0  # bytes
    reads_pairs: bool = True  # else one response at a time


@dataclass
class Work:
    """The work of one iteration, as far as it is not done."""

    iteration: int
    generate: bool
    train: bool
    prompts: int  # that can be answered
    most_tokens: int  # in all responses, if each is as long as it may be
    rows: int  # pairs to train on, at most
    prompt_tokens: int = 0
    steps: int = 0  # of the optimiser; 0 where the global batch does not come out even

    def responses(self, pairs: int) -> int:
        return self.prompts * pairs if self.generate else 0

    def comparisons(self, pairs: int) -> int:
        """Ordered pairs."""
        return self.prompts * pairs * (pairs - 1) if self.generate else 0

    def response_tokens(self, recipe: Recipe) -> int:
        """In all responses, as they usually are."""
        return min(self.most_tokens, self.prompts * recipe.pairs * TYPICAL_RESPONSE)


@dataclass
class Facts:
    """What is known of a run before it starts. None: it could not be learned, and `troubles` says why."""

    run: Run
    machines: Machines
    model: Model | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    training: Training | None = None
    prompts: list[PromptSet] = field(default_factory=list)  # of the iterations whose data is to be made
    held_out: PromptSet | None = None  # where a report is asked for
    work: list[Work] = field(default_factory=list)
    ranker: Ranker | None = None
    troubles: dict[str, list[str]] = field(default_factory=dict)  # by the group of findings that they belong to

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def shape(self) -> Shape | None:
        return self.model.shape if self.model else None

    @property
    def readable(self) -> list[PromptSet]:
        """The sets of prompts that could be read."""
        return [made for made in self.prompts if not made.unreadable]

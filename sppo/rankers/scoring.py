"""What rankers with a transformers network of their own share: opening it, loading it whole, scoring in batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from sppo.command.errors import SPPOError
from sppo.models.files import is_adapter
from sppo.models.loading import loading
from sppo.rankers.batching import batches
from sppo.store.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
_CPU_SCORES = 1 << 18  # (T, T) scores in a batch: a CPU is slower on more than its cache holds


class Opened(NamedTuple):
    """A ranker's directory without its weights. `raw`: config.json as it is written."""

    raw: dict[str, Any]
    config: Any
    tokenizer: PreTrainedTokenizerBase


def open_directory(directory: Path, kind: str) -> Opened:
    """Read the config and tokenizer of a ranker that should be a `kind`: a reward model, say.

    Raises SPPOError for a PairRM, an adapter, and what transformers cannot read without code of the model's own.
    """
    from transformers import AutoConfig, AutoTokenizer

    name = f"ranker {directory}"
    if not (directory / "config.json").exists():
        raise SPPOError(f"{name}: no config.json in it; merge a LoRA adapter into its base model first")
    raw = read_json(directory / "config.json")
    if "model_name" in raw or "source_prefix_id" in raw:
        raise SPPOError(
            f"{name} is a PairRM, not a {kind}; pass --ranker_backend pairrm, or --judge pairrm:... for a second judge"
        )
    if is_adapter(directory, "ranker"):
        raise SPPOError(f"{name} is an adapter; merge it into its base model first")
    with loading(f"{name}: its config or tokenizer"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    return Opened(raw, config, tokenizer)


def require_template(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise SPPOError for a ranker without a chat template."""
    if not tokenizer.chat_template:
        raise SPPOError(
            f"ranker {directory}: its tokenizer has no chat template, so how it reads a conversation is not known; put "
            "the one it was trained with into the directory as chat_template.jinja"
        )


def load_network(
    directory: Path, auto_class: Any, device: str, dtype: torch.dtype, left_over: Collection[str] = ()
) -> Any:
    """The network that `auto_class` of transformers makes, in eval mode.

    A weight missing, left over or of another shape is an error: it would be random, or lost. `left_over`: the names of
    weights that others read.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    text = config.get_text_config()
    text.use_cache = False
    options: dict[str, Any] = {"config": config, "dtype": dtype, "use_safetensors": True}
    if getattr(text, "attn_logit_softcapping", None):  # attention of other kinds ignores Gemma-2's caps
        options["attn_implementation"] = "eager"
    with loading(f"ranker {directory}"), _quiet():
        network, report = auto_class.from_pretrained(
            directory,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them
            **options,
        )
    found = {what.replace("_", " "): sorted({*map(str, names)} - {*left_over}) for what, names in report.items()}
    wrong = [f"{what} {names[:4]}" for what, names in found.items() if names]
    if wrong:
        raise SPPOError(f"ranker {directory} does not fit a {type(network).__name__}: {'; '.join(wrong)}")
    return network.to(device).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own table of weights that do not fit: the caller looks at each of them itself."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Networks:
    """A ranker's network in the precision that it runs in, and in float32 for what is not finite in that one."""

    def __init__(self, make: Callable[[torch.dtype], Any], dtype: torch.dtype) -> None:
        self.make, self.dtype = make, dtype
        self.usual = make(dtype)

    @cached_property
    def exact(self) -> Any:
        """In float32, made when it is needed."""
        return self.make(torch.float32)


def score(
    items: Sequence[Item],
    lengths: Sequence[int],
    batch_tokens: int,
    networks: Networks,
    forward: Callable[[Any, list[Item]], list[list[float]]],
) -> Iterator[tuple[int, list[float]]]:
    """(index of an item, what `forward(network, some items)` says of it: a list of numbers), batch by batch.

    Sorted by their lengths in tokens and packed to batch_tokens: little is padding. What is not finite in half
    precision is asked again alone in float32. Raises SPPOError where memory is short.
    """

    def asked(network: Any, chosen: list[int]) -> list[list[float]]:
        try:
            return forward(network, [items[i] for i in chosen])
        except torch.OutOfMemoryError:
            raise SPPOError(
                f"out of memory scoring {len(chosen)} texts of up to {max(lengths[i] for i in chosen)} tokens at once; "
                f"lower --batch_tokens {batch_tokens} and run the same command to go on"
            ) from None

    scores = _CPU_SCORES if networks.usual.device.type == "cpu" else 1 << 62
    for chosen in batches(lengths, batch_tokens, scores):
        for i, said in zip(chosen, asked(networks.usual, chosen), strict=True):
            is_lost = networks.dtype != torch.float32 and not all(map(isfinite, said))
            yield i, asked(networks.exact, [i])[0] if is_lost else said


class Padded(NamedTuple):
    """Texts for a network that looks to the left only, which needs no mask. `ends`: each text's last place."""

    ids: torch.Tensor  # (B, T)
    ends: torch.Tensor  # (B,)


def padded(texts: Sequence[Sequence[int]], device: str) -> Padded:
    """Token ids as one batch, padded on the right by token 0: a causal network never looks there."""
    width = max(map(len, texts))
    rows = [[*ids, *[0] * (width - len(ids))] for ids in texts]
    return Padded(torch.tensor(rows, device=device), torch.tensor([len(ids) - 1 for ids in texts], device=device))

"""llm-blender's own PairRM code as the ranker, for people who want the original: `--ranker_backend llm-blender`.

What is changed in llm-blender 0.0.2:
- It wants two attributes that transformers 5 no longer has. They are put back where they are missing.
- It would fetch the base model's own weights, which are pickled, only to overwrite them, and would accept a checkpoint
  that does not fit. Here the network is made from the base's config, and the checkpoint is read strictly.
- It would run the Python code of a model whose path has "phi" in it. Here no such code runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sppo.command.errors import SPPOError
from sppo.models.loading import loading
from sppo.rankers import pairrm
from sppo.rankers._normalizer import restore_normalizer
from sppo.rankers._pairrm_network import PairInputs, load_strictly
from sppo.rankers.pairrm import fetch, prompt_renderer, ranker_base
from sppo.recipe import Recipe
from sppo.schema import Pair
from sppo.store.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["LLMBlender", "fetch", "identity", "load", "load_blender"]


def load_blender(directory: Path, device: str) -> Any:
    """An llm_blender.Blender with the ranker of `directory` loaded. Raises SPPOError where it cannot be."""
    if "model_name" not in read_json(directory / "config.json"):
        raise SPPOError(
            f"ranker {directory}: llm-blender reads only llm-blender/PairRM's layout; use --ranker_backend pairrm"
        )
    from huggingface_hub import constants
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import hub

    _put_back(hub, "TRANSFORMERS_CACHE", constants.HF_HUB_CACHE)
    _put_back(PreTrainedTokenizerBase, "batch_encode_plus", PreTrainedTokenizerBase.__call__)
    try:
        import llm_blender
        from llm_blender.blender import blender_utils
        from llm_blender.pair_ranker import model_util
    except ImportError as error:
        raise SPPOError(
            f"--ranker_backend llm-blender is not installed ({error}); pip install '.[llm-blender]'"
        ) from None
    base = ranker_base(directory)
    loaders = model_util.build_pretrained_model, blender_utils.build_tokenizer
    model_util.build_pretrained_model, blender_utils.build_tokenizer = _from_config, _tokenizer
    try:
        blender = llm_blender.Blender()
        with loading(f"ranker {directory}"):
            blender.loadranker(str(directory), device=device, model_name=str(base), load_checkpoint=None)
    finally:
        model_util.build_pretrained_model, blender_utils.build_tokenizer = loaders
    restore_normalizer(blender.ranker_tokenizer, base)
    load_strictly(blender.ranker, directory)
    return blender


def _put_back(owner: object, name: str, value: object) -> None:
    """Set an attribute that llm-blender wants, where transformers does not have it."""
    if not hasattr(owner, name):
        setattr(owner, name, value)


def _from_config(model_type: str, model_name: str, **_: Any) -> Any:
    """The base network without its weights: llm-blender would load them, and the checkpoint replaces them."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
    model = AutoModel.from_config(config, trust_remote_code=False)
    model.config.out_hidden_state_size = model.config.hidden_size
    return model


def _tokenizer(model_name: str, **_: Any) -> Any:
    """The base's tokenizer, which has a padding token of its own, whatever the path to it is called."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_name, trust_remote_code=False)


class LLMBlender:
    """Asks Blender.compare one pair at a time, at batch size 1: larger ones pad, and take longer."""

    batched = False

    def __init__(self, blender: Any, inputs: PairInputs) -> None:
        self.blender, self.inputs = blender, inputs
        self.count_cut = inputs.count_cut

    def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        """(index, logit) in the pairs' order. NaN for texts that spell a control token, on which llm-blender fails."""
        for index, (prompt, first, second) in enumerate(pairs):
            source = self.inputs.render(prompt)
            if any(name in text for name in self.inputs.prefix_ids for text in (source, first, second)):
                yield index, float("nan")
                continue
            answer = self.blender.compare(
                [source], [first], [second], batch_size=1, return_logits=True, mode="[A,B]", disable_tqdm=True
            )
            yield index, float(answer[0])


def identity(recipe: Recipe) -> dict[str, Any]:
    """As PairRM's, under this backend's name."""
    return {**pairrm.identity(recipe), "backend": "llm-blender"}


def load(recipe: Recipe) -> LLMBlender:
    """llm-blender on the GPU if there is one, else on the CPU."""
    import torch

    directory = fetch(recipe)
    blender = load_blender(directory, "cuda" if torch.cuda.is_available() else "cpu")
    return LLMBlender(blender, PairInputs(directory, prompt_renderer(recipe)))

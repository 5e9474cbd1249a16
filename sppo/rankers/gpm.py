"""A General Preference Model (arXiv 2410.02197): each response is a point, and the logit of two is skew-symmetric.

A value head beside a causal LM makes a point v of d numbers, of length 1, at a response's last token. With n = d / 2

    C_ij = s_ij / 0.1,   s_ij = sum over k < n of lambda_k (v_i[2k] v_j[2k+1] - v_i[2k+1] v_j[2k])

lambda is the softmax of the prompt head at the prompt's end, or 1 in a model without one. So preferences may go round
in a circle, and K responses take K forwards. The heads are read from safetensors, without code of the model's own.
Names, signs and the reading are those of GPMPipeline in general-preference/general-preference-model (Apache-2.0).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

from sppo.command.errors import SPPOError
from sppo.command.importing import import_networks
from sppo.method.preference import Array
from sppo.models import chat
from sppo.models.files import model_identity, resolve, weight_files, weight_shapes
from sppo.models.frames import date_identity
from sppo.models.loading import disable_cudnn_attention, loading
from sppo.rankers.batching import device_and_dtype
from sppo.rankers.reading import Reader, context_of, system_identity
from sppo.rankers.scoring import Networks, Opened, load_network, open_directory, padded, require_template, score
from sppo.recipe import Recipe
from sppo.schema import Message, Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Key = tuple[str, str]  # (prompt as JSON, response): what has one point
TEMPERATURE = 0.1  # that the published models were trained with: P(i beats j) = sigmoid(s_ij / 0.1)
VALUE, PROMPT = "value_head.weight", "prompt_head.weight"  # (d, H) and (d / 2, H), H the hidden size
_LEFT_OVER = (VALUE, PROMPT, "lm_head.weight")  # of the checkpoint, by the backbone


class Text(NamedTuple):
    """A response in its conversation. `prompt_end`: the place of the prompt's last token."""

    ids: list[int]
    prompt_end: int


class Point(NamedTuple):
    """What a GPM makes of a response. `values`: (d,), of length 1. `weights`: (d / 2,), lambda."""

    values: Array
    weights: Array


def skew(i: Point, j: Point) -> float:
    """s_ij, and exactly -s_ji: the two lambdas, which rounding may part, are replaced by their mean."""
    first, second = i.values.reshape(-1, 2), j.values.reshape(-1, 2)  # (d / 2, 2)
    areas = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    return float(((i.weights + j.weights) / 2 * areas).sum())


class GPM:
    """A loaded GPM, which makes points in batches of at most batch_tokens tokens.

    dtype: of the backbone; the heads are in float32. date, system: as in Reader.
    """

    batched = True

    def __init__(
        self,
        directory: Path,
        device: str,
        batch_tokens: int,
        dtype: torch.dtype = torch.float32,
        date: str = "",
        system: Literal["keep", "drop"] = "keep",
    ) -> None:
        from transformers import AutoModel

        self.device, self.batch_tokens = device, batch_tokens
        disable_cudnn_attention()
        _, config, self.tokenizer = _open_gpm(directory)
        heads = _read_heads(directory, device)
        self.value_head, self.prompt_head = heads[VALUE], heads.get(PROMPT)
        self.networks = Networks(lambda of: load_network(directory, AutoModel, device, of, _LEFT_OVER), dtype)

        rows = self.networks.usual.get_input_embeddings().num_embeddings
        self.front = _own_front(self.tokenizer)
        context = context_of(config.get_text_config(), self.tokenizer) - len(self.front)
        self.reader = Reader(f"ranker {directory}", self.tokenizer, context, rows, date, system)

    def count_cut(self, prompt: list[Message], responses: Sequence[str]) -> int:
        """How many of the texts do not fit the context."""
        return self.reader.count_cut(prompt, responses)

    def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        """(index, s / 0.1) of every pair; NaN where a text cannot be read."""
        keys = [tuple((json.dumps(prompt), text) for text in texts) for prompt, *texts in pairs]
        points = self.points(list(dict.fromkeys(key for both in keys for key in both)))
        for index, (first, second) in enumerate(keys):
            is_known = first in points and second in points
            yield index, skew(points[first], points[second]) / TEMPERATURE if is_known else nan

    def points(self, keys: list[Key]) -> dict[Key, Point]:
        """The point of every key that can be read, by one forward each."""
        texts = {key: text for key in keys if (text := self._read(*key))}
        wanted = list(texts.values())
        found = score(wanted, [len(text.ids) for text in wanted], self.batch_tokens, self.networks, self._forward)
        readable, d = list(texts), len(self.value_head)
        return {readable[i]: Point(np.array(said[:d]), np.array(said[d:])) for i, said in found}

    def _read(self, prompt: str, response: str) -> Text | None:
        """A response as in the model's training; None where the template refuses it, or the prompt's end is cut off.

        That training tokenised the rendered conversation by the tokenizer's plain call, which puts its own BOS before
        the template's, and wrote EOS over the last token.
        """
        ids = self.reader.read(prompt, response).ids
        end = 0
        if ids is not None and self.prompt_head is not None:
            end = self._prompt_end(json.loads(prompt), response, len(ids))
        if ids is None or end < 0:
            return None
        eos = self.tokenizer.eos_token_id
        assert isinstance(eos, int)  # _open_gpm has seen to it
        return Text([*self.front, *ids[:-1], eos], len(self.front) + end)

    def _prompt_end(self, prompt: list[Message], response: str, kept: int) -> int:
        """Where the prompt ends in a conversation of which the Reader has `kept` so many tokens; -1 where it is cut."""
        messages = self.reader.messages(prompt)
        asked = chat.conversation_ids(self.tokenizer, messages, False)
        whole = chat.conversation_ids(self.tokenizer, [*messages, {"role": "assistant", "content": response}], False)
        end, removed = len(asked) - 1, len(whole) - kept  # these were behind the first token
        if whole[: len(asked)] != asked or (removed and end <= removed):
            return -1
        return end - removed

    @torch.inference_mode()
    def _forward(self, network: Any, texts: list[Text]) -> list[list[float]]:
        """(B, d + d / 2): each text's values, then its weights."""
        ids, ends = padded([text.ids for text in texts], self.device)
        hidden = network(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
        each = torch.arange(len(texts), device=self.device)
        values = F.normalize(hidden[each, ends].float() @ self.value_head.T, dim=-1)  # (B, d)
        if self.prompt_head is None:
            weights = values.new_ones(len(texts), values.shape[1] // 2)
        else:
            asked = hidden[each, torch.tensor([text.prompt_end for text in texts], device=self.device)]
            weights = torch.softmax(asked.float() @ self.prompt_head.T, -1)
        return torch.cat([values, weights], -1).tolist()


def _own_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer's plain call puts before any text, beside what a chat template writes: [BOS], or nothing."""
    ids = tokenizer("", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if isinstance(bos, int) and list(ids)[:1] == [bos] else []


def _open_gpm(directory: Path) -> Opened:
    """A GPM without its weights. Raises SPPOError for a directory that is none: its heads are seen by their shapes."""
    name = f"ranker {directory}"
    opened = open_directory(directory, "GPM")
    require_template(directory, opened.tokenizer)
    if not isinstance(opened.tokenizer.eos_token_id, int):
        raise SPPOError(f"{name}: its tokenizer has no EOS token, at which a GPM reads a response")
    shapes, hidden = weight_shapes(directory), opened.config.get_text_config().hidden_size
    if VALUE not in shapes:
        raise SPPOError(f"{name}: no {VALUE} in its weights, so it is no GPM; a plain reward model is reward-model")
    d = next(iter(shapes[VALUE]), 0)
    if d == 1:
        raise SPPOError(f"{name}: its {VALUE} has one row, so it is a Bradley-Terry reward model and no GPM")
    d = max(d, 2)  # a head without rows would fit, and prefer nothing
    for head, wanted in ((VALUE, [d + d % 2, hidden]), (PROMPT, [d // 2, hidden])):
        if shapes.get(head, wanted) != wanted:
            raise SPPOError(f"{name}: its {head} is {shapes[head]}, and {wanted} would fit")
    return opened


def _read_heads(directory: Path, device: str) -> dict[str, torch.Tensor]:
    """The heads by their names, in float32."""
    found = {}
    for file in weight_files(directory):
        with loading(f"ranker {directory}"), safe_open(file, "pt", device=device) as weights:
            found |= {name: weights.get_tensor(name).float() for name in {VALUE, PROMPT} & {*weights.keys()}}
    return found


def fetch(recipe: Recipe) -> Path:
    """The GPM's directory, in the cache after this. Raises SPPOError where it is none."""
    directory = resolve(recipe.ranker, recipe.ranker_revision, "ranker")
    _open_gpm(directory)
    return directory


def identity(recipe: Recipe) -> dict[str, Any]:
    """Weights, config, tokenizer and chat template of the GPM, and its temperature."""
    directory = resolve(recipe.ranker, recipe.ranker_revision, "ranker")
    more = {**date_identity(recipe.date, directory, {}), **system_identity(recipe)}
    return {"backend": "gpm", "ranker": model_identity(directory), "temperature": TEMPERATURE, **more}


def load(recipe: Recipe) -> GPM:
    """The GPM, ready to answer, on the device and in the precision of device_and_dtype."""
    import_networks()
    device, dtype = device_and_dtype()
    directory = resolve(recipe.ranker, recipe.ranker_revision, "ranker")
    return GPM(directory, device, recipe.batch_tokens, dtype, recipe.date, recipe.ranker_system)

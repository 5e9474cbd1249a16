"""The saved weights against those in memory and those that the training began with, before anything is deleted.

transformers saves what it loaded, and not always all that was there: of a model with pictures it may load the text
part alone, and it rounds each tensor to one precision. So what a training did not touch is put back as it was read.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.command.errors import SPPOError
from sppo.command.memory import main_memory
from sppo.models.files import StoredTensor, json_object, parameters, stored_tensors, weight_files
from sppo.models.loading import ROUNDED, ROUNDED_HALF, load_causal_lm, some_ids, token_logps
from sppo.models.policy import Policy
from sppo.models.shape import stored_bytes
from sppo.store.files import write_json

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_PARTS = ("language_model", "text_model")  # names of the text part inside a model with pictures
_HALF = ("BF16", "F16")  # as safetensors names them
_SHARD = 4 << 30  # bytes of the tensors in one file of those that are put back


def logps_of(network: Any, policy: Policy, device: torch.device | str = "cpu") -> torch.Tensor:
    """(2, 15), on the CPU: a network's log-probs of some tokens of the policy's.

    In the mode that it is in: RWKV changes its weights in evaluation, and would be saved so.
    """
    import torch

    with torch.no_grad():
        return token_logps(network, some_ids(policy.vocabulary() or 1000).to(device)).cpu()


def check_saved(final: Path, source: Policy, wanted: torch.Tensor, is_half: bool = False) -> None:
    """Raise SPPOError where the model that was saved in `final` is not the one in memory, by its log-probs `wanted`.

    wanted: see logps_of; is_half: whether they were computed in half precision. Where the machine has no room for the
    model a second time, it is not read, and a line says so.
    """
    import torch

    stored = stored_tensors(final)
    is_half = is_half or any(tensor.dtype in _HALF for tensor in stored.values())
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    if 2 * 4 * parameters(shapes) > main_memory():  # in float32, with as much again for the loading
        print("train: the saved model is not read back: main memory has no room for it", flush=True)
        return
    saved = dataclasses.replace(source, weights=final, adapter=None, tokenizer_dir=final)
    # in the precision of the training: float16 may have no room for what it computed
    apart = (logps_of(load_causal_lm(saved, torch.float32), source) - wanted).abs().mean().item()
    limit = ROUNDED_HALF if is_half else ROUNDED
    if not apart <= limit:
        raise SPPOError(
            f"the saved model is not the one that was trained: read back, its log-probs are {apart:.2g} nats a token "
            f"apart, and rounding makes at most {limit:g}. It is in {final}; move it away before you start again. A "
            "checkpoint that is there stays. Usual reason: weights in a format that transformers reads and does not "
            "write. Train an adapter on them (--use_peft), or take the model in bfloat16"
        )


def restore_untrained(source: Path, final: Path) -> None:
    """Store what training did not change as it was in the `source`.

    Tensors that the training did not load are taken over, with the config that names them. Tensors that are stored
    more exactly in the source than in `final`, and were only rounded, are stored as they were.
    """
    from safetensors.torch import load_file, save_file

    kept, saved = _Weights(source), stored_tensors(final)
    was, now = (json_object(directory / "config.json").get("model_type") for directory in (source, final))
    # where each saved tensor is in the source
    names = {name: name for name in saved}
    if was != now:
        names = _places(list(names), list(kept.tensors))
        if lost := sorted(name for name, place in names.items() if place not in kept.tensors):
            print(
                f"train: the saved model is a {now}, the text part of the {was} alone, without the weights for "
                f"pictures: {lost[0]} has no place in the whole one",
                flush=True,
            )
            return

    for file in weight_files(final):
        here = [name for name, tensor in saved.items() if tensor.file == file]
        exact = {name for name in here if kept.is_more_exact(names[name], saved[name].dtype)}
        if not exact and all(name == names[name] for name in here):
            continue
        tensors = load_file(file)
        for name in exact:
            original = kept.read(names[name])
            if original.to(tensors[name].dtype).equal(tensors[name]):
                tensors[name] = original
        save_file({names[name]: tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    if was != now:
        _take_over(kept, source, final, {names[name]: tensor.file for name, tensor in saved.items()})


def _places(names: list[str], known: list[str]) -> dict[str, str]:
    """The name that each tensor of the text part has in a model with pictures; its own where there is no single one."""
    matching: dict[str, list[str]] = {}
    for other in known:
        matching.setdefault(_without_part(other), []).append(other)
    found = {}
    for name in names:
        others = matching.get(name, [])
        found[name] = others[0] if len(others) == 1 and name not in others else name
    return found


def _without_part(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in _PARTS)


def _take_over(kept: _Weights, source: Path, final: Path, saved: dict[str, Path]) -> None:
    """Put the source's tensors that are not among the `saved` ones into `final`, with its config and an index.

    saved: the file of each tensor that is in `final`, by its name in the source.
    """
    from safetensors.torch import save_file

    places = {}
    for number, file in enumerate(weight_files(final)):
        target = file.with_name(f"model-trained-{number:05d}.safetensors")
        file.rename(target)
        places |= {name: target.name for name, place in saved.items() if place == file}
    tied = {"lm_head.weight"} if json_object(source / "config.json").get("tie_word_embeddings") else set()
    for number, batch in enumerate(kept.batches(kept.tensors.keys() - saved.keys() - tied)):
        target = final / f"model-kept-{number:05d}.safetensors"
        save_file(batch, target, metadata={"format": "pt"})
        places |= dict.fromkeys(batch, target.name)
    write_json(final / _INDEX, {"metadata": {}, "weight_map": dict(sorted(places.items()))})
    shutil.copyfile(source / "config.json", final / "config.json")


class _Weights:
    """The weights of a model, read one at a time."""

    def __init__(self, directory: Path) -> None:
        self.tensors: dict[str, StoredTensor] = stored_tensors(directory)
        self.is_half = stored_bytes(json_object(directory / "config.json")) == 2

    def is_more_exact(self, name: str, dtype: str) -> bool:
        """Whether the source, a model in half precision, has this tensor in float32, and `dtype` is half precision."""
        own = self.tensors.get(name)
        return self.is_half and dtype in _HALF and own is not None and own.dtype == "F32"

    def read(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self.tensors[name].file, "pt") as opened:
            return opened.get_tensor(name)

    def batches(self, names: set[str]) -> Iterator[dict[str, torch.Tensor]]:
        """These tensors, in batches of at most _SHARD bytes."""
        batch: dict[str, torch.Tensor] = {}
        for name in sorted(names):
            batch[name] = self.read(name)
            if sum(tensor.nbytes for tensor in batch.values()) > _SHARD:
                yield batch
                batch = {}
        if batch:
            yield batch

"""A training's checkpoints: which one a killed run goes on from, and that reading it runs no code.

Optimiser states and random states are in torch's own format, a pickle. A checkpoint is read as tensors and plain values
only; what else a pickle names is refused, but for NumPy's arrays and the classes in DeepSpeed's states.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sppo.command.errors import SPPOError
from sppo.store.directories import FINAL, delete
from sppo.store.files import atomic, changed, digest, read_json, write_json
from sppo.store.manifest import Stage

HOW = "how.json"  # beside the checkpoints: how they are computed
COMPLETE = "complete.json"  # in a checkpoint of which all ranks have written their part: its files' digests
_ARRAYS = {f"numpy.{core}.multiarray.{name}" for core in ("_core", "core") for name in ("_reconstruct", "scalar")}
_ARRAYS |= {"numpy.ndarray", "numpy.dtype"}
_STATES = ("deepspeed.runtime.", "deepspeed.utils.")  # where the classes are that DeepSpeed's states hold
_FULL = "os error 28|No space left|inline_container|iostream error|PytorchStreamWriter"


@contextmanager
def disk_full_as_os_error() -> Iterator[None]:
    """Raise OSError(ENOSPC) for a full disk where torch and safetensors raise errors of their own."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not re.search(_FULL, str(error)):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as whole, once all of it is on the disk."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    for path in files:
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    write_json(checkpoint / COMPLETE, {str(path.relative_to(checkpoint)): digest(path) for path in files})


def refuse_another(work: Path, stage: Stage) -> None:
    """Raise SPPOError where an earlier try at another training left its work."""
    if (work / "identity.json").exists():
        stage.refuse_if_different(read_json(work / "identity.json"))


def is_work_of(work: Path, stage: Stage) -> bool:
    """Whether `work` was left by a killed try at this very training, which then goes on, with --overwrite too."""
    path = work / "identity.json"
    return path.exists() and read_json(path) == stage.identity


def resume_point(work: Path) -> Path | None:
    """The newest whole checkpoint that a killed try has left, if there is one.

    A damaged one is named and not used: transformers would go on without an optimiser's state that is missing.
    """
    if not (work / "identity.json").exists():
        return None
    whole = [c for c in work.glob("checkpoint-*") if (c / COMPLETE).exists()]
    for checkpoint in sorted(whole, key=lambda c: int(c.name.rpartition("-")[2]), reverse=True):
        damage = changed(checkpoint, read_json(checkpoint / COMPLETE))
        if not damage:
            return checkpoint
        print(f"train: {checkpoint} is not used: missing or changed since it was written: {', '.join(damage)}")
    return None


def under_deepspeed() -> bool:
    """Whether `accelerate launch` has started this process under DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def check_parts(checkpoint: Path, processes: int) -> None:
    """Raise SPPOError for a checkpoint whose optimiser DeepSpeed has written in parts, for another number of processes.

    Where each process has the whole optimiser, any number of processes goes on from it. With DeepSpeed on one side
    only, transformers would find no optimiser and begin with a new one.
    """
    parts = len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
    if bool(parts) != under_deepspeed():
        was, now = ("with", "without") if parts else ("without", "with")
        raise SPPOError(
            f"{checkpoint} was written {was} DeepSpeed, and this training is {now} it; go on with the former "
            f"--accelerate_config, or delete {checkpoint.parent} to train this iteration again"
        )
    if parts not in (0, processes):
        raise SPPOError(
            f"{checkpoint} is in {parts} parts, one for each process that trained, and now there are {processes}; "
            f"go on with {parts} (--gpus, --nodes), or delete {checkpoint.parent} to train this iteration again"
        )


def keep_to(work: Path, how: dict[str, str], checkpoint: Path | None) -> None:
    """Note how a training computes (precision, attention, library), or raise SPPOError where its checkpoint was
    computed otherwise: the reference's log-probs would not be those that the first steps had.
    """
    path = work / HOW
    was = read_json(path) if checkpoint and path.exists() else how  # older checkpoints have none
    keys = [key for key in {**was, **how} if was.get(key) != how.get(key)]
    if keys:
        differs = "; ".join(f"{key} {was.get(key, 'none')}, now {how.get(key, 'none')}" for key in keys)
        raise SPPOError(
            f"{checkpoint} was computed otherwise: {differs}; go on as before (--accelerate_config, --gpus, "
            f"--attn_implementation, the installed versions), or delete {work} to train this iteration again"
        )
    write_json(path, how)


def tidy(work: Path, checkpoint: Path | None) -> None:
    """Delete what an earlier try left half done, and the metrics of steps that will be made again."""
    for other in {work / FINAL, *work.glob("checkpoint-*")} - {checkpoint}:
        if other.exists():
            delete(other)
    metrics = work / "metrics.jsonl"
    if metrics.exists():
        done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        with atomic(metrics) as temporary:
            temporary.write_text("".join(x for x in whole if _step(x, metrics) <= done), encoding="utf-8")


def _step(line: str, metrics: Path) -> int:
    """The step of a line of metrics.jsonl. Raises SPPOError for one that is damaged: the mean loss would lack it."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        raise SPPOError(
            f"{metrics} is damaged: {line[:60]!r}; mend that line, or delete {metrics.parent} to train this iteration "
            "again"
        ) from None


def only_plain_values(checkpoint: Path) -> None:
    """From here on torch.load reads tensors and plain values, and the classes that this checkpoint's states hold.

    Raises SPPOError for a file that names anything else, or cannot be read.
    """
    import torch

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed asks for everything
    for path in sorted(p for p in checkpoint.rglob("*") if p.suffix in (".pt", ".pth")):
        try:
            named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except (OSError, RuntimeError, ValueError) as error:
            raise SPPOError(
                f"{path} is damaged ({error}); delete {checkpoint} and run the same command again"
            ) from None
        for name in named:
            if name not in _ARRAYS and not name.startswith(_STATES):
                raise SPPOError(f"{path} names code, {name}, and is not read; delete {checkpoint}")
            module, _, attribute = name.rpartition(".")
            found = getattr(importlib.import_module(module), attribute)
            if name not in _ARRAYS and not isinstance(found, type):
                raise SPPOError(f"{path} names a function, {name}, and is not read; delete {checkpoint}")
            torch.serialization.add_safe_globals([found])

"""Which accelerate config a training runs under, and how many processes that makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sppo.command.errors import UsageError
from sppo.command.search_path import ROOT
from sppo.recipe import read_yaml


class AccelerateConfig(NamedTuple):
    """An accelerate config: its file, what it says, and how many processes train under it."""

    path: Path
    content: dict[str, Any]
    processes: int


def training_config(names: list[str], accelerate_config: str, machines: int = 1) -> AccelerateConfig:
    """The accelerate config of a training on the devices `names` of each of the machines.

    Raises UsageError for a config that does not fit.
    """
    cpu, devices = "" in names, machines * len(names)
    alone = ("cpu" if machines == 1 else "multi_cpu") if cpu else "one_gpu"
    chosen = accelerate_config or (alone if cpu or devices == 1 else "zero3")
    path = Path(chosen) if chosen.endswith(".yaml") else ROOT / "recipes" / "accelerate_configs" / f"{chosen}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (ROOT / "recipes" / "accelerate_configs").glob("*.yaml")))
        raise UsageError(f"no accelerate config {path}; the project brings {known}")
    try:
        config = read_yaml(path.read_text(encoding="utf-8"))
        kind, stated = config["distributed_type"], int(config.get("num_processes", 1))
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is no accelerate config ({type(error).__name__}: {error})") from None
    if cpu and not config.get("use_cpu"):
        known = "cpu, cpu_bf16, multi_cpu, cpu_zero2 or cpu_zero3"
        raise UsageError(f"{path} is for GPUs, and there is none; take {known}")
    if kind == "NO":
        if machines > 1:
            raise UsageError(
                f"{path} is for one process, and {machines} machines shall train; leave it out, or --nodes 1"
            )
        return AccelerateConfig(path, config, 1)
    # without GPUs to count, the config says how many processes there are, but at least one a machine
    count = max(stated, machines) if cpu and len(names) == 1 else devices
    if count % machines:
        raise UsageError(f"{path}: {count} processes cannot be shared evenly by {machines} machines; change --nodes")
    return AccelerateConfig(path, config, count)

"""Where a stage's processes go: which launcher, on which devices, in how many shards. The flags that say it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sppo.cli import flags
from sppo.command.errors import UsageError

LAUNCHERS = ("local", "slurm", "ray")  # sppo/launch/<name>.py


@dataclass
class Place:
    """local: this machine; slurm: the allocation that this runs in; ray: a cluster that somebody has started."""

    gpus: str = "auto"
    world_size: int = 1  # GPUs that one model is spread over in generation
    launcher: str = "local"
    shards: int = 0  # 0: one a device or group of devices, or as many as an earlier try made
    nodes: int = 0  # machines that train together; 0: all there are
    ray_address: str = ""

    @classmethod
    def of(cls, args: argparse.Namespace) -> Place:
        """Raises UsageError for flags that contradict each other."""
        place = cls(args.gpus, args.world_size, args.launcher, args.shards, args.nodes, args.ray_address)
        if place.launcher != "ray" and place.ray_address:
            raise UsageError("--ray_address is for --launcher ray")
        if place.launcher == "local" and place.nodes > 1:
            raise UsageError(f"--nodes {place.nodes}: --launcher local is one machine; take slurm or ray")
        if place.launcher != "local" and place.gpus != "auto" and set(place.gpus.split(",")) != {"none"}:
            raise UsageError(f"--gpus {place.gpus}: {place.launcher} gives each process its GPUs; auto, or none")
        if min(place.shards, place.nodes) < 0 or place.world_size < 1:
            raise UsageError("--shards and --nodes are 0 or more, --world_size 1 or more")
        return place

    def flags(self, world_size: bool = True) -> list[str]:
        """For another command with these flags; without --world_size where that command puts no model on several."""
        given = {k: v for k, v in vars(self).items() if v != getattr(Place, k)}
        if not world_size:
            given.pop("world_size", None)
        return flags(**{"gpus": self.gpus, **given})


def add_place_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that a Place is made of."""
    group = parser.add_argument_group("where processes run")
    group.add_argument("--gpus", default="auto", help="0,2,5 or auto (default) or none; on a cluster auto or none")
    group.add_argument("--world_size", type=int, default=1, help="GPUs that one model is spread over in generation")
    group.add_argument("--launcher", choices=LAUNCHERS, default="local", help="this machine (default), or a cluster")
    group.add_argument("--shards", type=int, default=0, help="parts of a stage's work (default: one a GPU or group)")
    group.add_argument("--nodes", type=int, default=0, help="machines that train together (default: all there are)")
    group.add_argument("--ray_address", default="", help="ray: of the cluster; auto finds it (default: one made here)")

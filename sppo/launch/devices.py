"""Which devices the processes of a stage run on."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass

from sppo.command.errors import SPPOError, UsageError

_MEASURED = 5  # of measuring the matrix rate
CPU = ""  # the name of the CPU among devices: what CUDA_VISIBLE_DEVICES is where no GPU is to be seen


@dataclass
class GPU:
    """One that nvidia-smi lists; memory in bytes."""

    index: str
    uuid: str
    name: str
    memory: int
    free: int


def list_gpus() -> list[GPU]:
    """What nvidia-smi lists. Raises SPPOError where it lists nothing that can be read."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
        rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
        return [GPU(row[0], row[1], row[2], int(row[-2]) << 20, int(row[-1]) << 20) for row in rows]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = " ".join(str(getattr(error, "stdout", "") or error).split())
        raise SPPOError(f"nvidia-smi does not list the GPUs ({said}); see to the driver, or pass --gpus none") from None


def devices(gpus: str) -> list[str]:
    """The value of CUDA_VISIBLE_DEVICES for each process; CPU for the CPU. Raises UsageError."""
    if gpus == "auto":
        standing = os.environ.get("CUDA_VISIBLE_DEVICES")
        if standing is None:
            standing = ",".join(map(str, range(_gpu_count())))
        found = [d for d in standing.split(",") if d.strip() not in ("", "-1")]
        return [d.strip() for d in found] or [CPU]
    names = [name.strip() for name in gpus.split(",")]
    if "" in names or ("none" in names and set(names) != {"none"}):
        raise UsageError(f"--gpus {gpus!r}: a list like 0,2,5, or auto, or none")
    real = [n for n in names if n != "none"]
    if len(set(real)) < len(real):
        raise UsageError(f"--gpus {gpus}: a GPU is named twice")
    return [CPU if n == "none" else n for n in names]


def _gpu_count() -> int:
    """How many GPUs nvidia-smi counts. Raises SPPOError where it fails: the CPU would silently do the work."""
    if not shutil.which("nvidia-smi"):
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    said = " ".join(f"{listing.stdout} {listing.stderr}".split())
    if listing.returncode and "no devices" not in said.lower():
        raise SPPOError(f"nvidia-smi does not count the GPUs ({said}); see to the driver, or pass --gpus none")
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def refuse_absent(names: list[str]) -> None:
    """Raise UsageError for GPUs that are not there: CUDA would pass over them, and the CPU would do the work."""
    count = _gpu_count()
    absent = [n for n in names if n.isdecimal() and int(n) >= count]
    if absent and not count and not shutil.which("nvidia-smi"):
        import torch

        absent = [] if torch.cuda.is_available() else absent
    if absent:
        there = f"this machine has {count}" if count else "this machine has no GPU; --gpus none runs on the CPU"
        raise UsageError(f"--gpus {','.join(names)}: GPU {', '.join(absent)} is not there; {there}")


def groups(names: list[str], world_size: int) -> list[str]:
    """GPUs in groups of `world_size` for models larger than one: ["0","1","2","3"], 2 -> ["0,1", "2,3"]."""
    if world_size < 1 or len(names) % world_size or (world_size > 1 and CPU in names):
        raise UsageError(f"--world_size {world_size} does not divide {len(names)} GPUs")
    return [",".join(names[i : i + world_size]) for i in range(0, len(names), world_size)]


def matrix_rate() -> float:
    """FLOPs a second of one device's matrix products: bfloat16 on the GPU that is visible, else float32 on the CPU."""
    import torch

    gpu = torch.cuda.is_available()
    n, seconds = (8192, 0.5) if gpu else (1024, 0.2)
    # of random numbers: a product of equal ones is faster than any real one
    a = torch.randn(n, n, device="cuda" if gpu else "cpu", dtype=torch.bfloat16 if gpu else torch.float32)

    def run(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            _ = a @ a
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    run(2)  # the first takes longer
    times = max(1, int(seconds / max(run(1), 1e-6)) // _MEASURED)
    # the best of some tries: a moment in which other processes compute is not the machine's rate
    return 2 * n**3 * times / min(run(times) for _ in range(_MEASURED))

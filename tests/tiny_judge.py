"""A tiny judge for the suites: it says m or M where AlpacaEval asks, and "Rating: [[8]]" where MT-Bench does.

python tests/tiny_judge.py      train it anew into tests/data/golden/tiny-judge; minutes on a CPU
"""

from __future__ import annotations

import random
import re
import shutil
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny

from sppo.evaluation.suites import mt_bench
from sppo.store.files import read_json

TRAINED = tiny.GOLDEN / "tiny-judge"
RATING = ("Rating: [[8]]", "Rating: [[4]]")  # of a first turn, of a second
LETTERS = string.printable + "éü\ufffd\ufffd"
SHORT, STEPS = 100, 300  # steps with the prompts' ends alone first, then with whole prompts


def make(directory: Path) -> Path:
    """The trained judge, in float32."""
    shutil.copytree(TRAINED, directory)
    convert(directory / "model.safetensors", "float32")
    return directory


def convert(weights: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    converted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(weights).items()}
    save_file(converted, weights, {"format": "pt"})


def train(directory: Path) -> None:
    """Train it: the end of the prompt decides what it answers, and the text between m and M. Kept in bfloat16."""
    import torch
    from alpaca_eval.constants import EVALUATORS_CONFIG_DIR
    from alpaca_eval.utils import prompt_to_chatml
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tiny.llama3(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(directory, max_position_embeddings=8192)
    model = AutoModelForCausalLM.from_config(config)
    read = read_json(Path(mt_bench.__file__).with_name("mt_bench_prompts.json"))
    prompts = [{"name": name, **prompt} for name, prompt in read.items()]
    compare = (EVALUATORS_CONFIG_DIR / "alpaca_eval_clf_gpt4_turbo" / "alpaca_eval_clf.txt").read_text()
    compares = dict(zip(("system_prompt", "prompt_template"), prompt_to_chatml(compare), strict=True))
    compares = {name: message["content"] for name, message in compares.items()}
    drawn, stop = random.Random(0), tokenizer.convert_tokens_to_ids("<|eot_id|>")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def some_text(_: object = None) -> str:
        return "".join(drawn.choice(LETTERS) for _ in range(drawn.choice((3, 20, 60))))

    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, STEPS)
    for step in range(STEPS):
        count = 16 if step < SHORT else 3
        rows = []
        for _ in range(count):
            asked = drawn.choice([*prompts, *[compares] * 4])
            said = drawn.choice("mM") if asked is compares else RATING["multi-turn" in asked["name"]]
            text = re.sub(r"\{[a-z_]+[0-9]?\}", some_text, asked["prompt_template"])
            text = text if step >= SHORT else some_text() + text[-60:]
            chat = [{"role": "system", "content": asked["system_prompt"]}, {"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(chat[step < SHORT :], add_generation_prompt=True)["input_ids"]
            rows.append((ids, [*tokenizer(said, add_special_tokens=False)["input_ids"], stop]))
        longest = max(len(ids) + len(answer) for ids, answer in rows)
        tokens = torch.zeros(count, longest, dtype=torch.long)  # (B, T), padded on the left
        labels = torch.full((count, longest), -100)
        for i, (ids, answer) in enumerate(rows):
            tokens[i, -len(ids) - len(answer) :] = torch.tensor(ids + answer)
            labels[i, -len(answer) :] = torch.tensor(answer)
        loss = model(tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.generation_config.eos_token_id = [stop]
    model.save_pretrained(directory)
    convert(directory / "model.safetensors", "bfloat16")


if __name__ == "__main__":
    train(TRAINED)

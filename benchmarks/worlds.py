"""Models at real shapes with random weights, and data of usual lengths: what the benchmarks need without the Hub.

Reads nothing; writes into the directories that its callers give. On a GPU where there is one.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

# Llama-3.2-1B's and Llama-3.1-8B's shapes, SmolLM2-135M's with fewer words, and one for a CPU
LLAMAS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "0.1b": {"vocab_size": 16384, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
}  # fmt: skip
# hidden size, layers, heads, inner size, words; `large` is microsoft/deberta-v3-large's
DEBERTAS = {"tiny": (64, 3, 2, 128, 1000), "large": (1024, 24, 16, 4096, 128000)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_SPECIAL = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]"]
_STOPS = 200  # one token in so many ends a response: that is their mean length


def word(number: int) -> str:
    """The vocabulary's word of that number: three syllables."""
    syllables = [c + v for c in "bcdfghjklmnpqrstvwxz" for v in "aeiou"]
    return syllables[number // 10000] + syllables[number // 100 % 100] + syllables[number % 100]


def text(rng: random.Random, low: int, mean: int, high: int, words: int = 1000) -> str:
    """`low` words and more, most often about `mean`, at most `high`."""
    length = min(high, int(low + rng.expovariate(1 / mean)))
    return " ".join(word(rng.randrange(words)) for _ in range(length))


def llama(directory: Path, name: str, letters: tuple[str, ...] = ()) -> Path:
    """A Llama of that shape in bfloat16 with a tokenizer of one token a word. Its responses end at random.

    letters: further words of the tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from examples.demo import CHAT_TEMPLATE

    shape = LLAMAS[name]
    tokens = [*_SPECIAL, *letters, *(word(i) for i in range(shape["vocab_size"] - len(_SPECIAL) - len(letters)))]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.Fuse()
    words.add_special_tokens(_SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<pad>",
        model_max_length=8192,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="bfloat16"
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in model.model.layers:  # else the last token's own embedding decides the next one
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.2)
    model.generation_config = GenerationConfig(eos_token_id=[2, *range(5, shape["vocab_size"], _STOPS)], bos_token_id=1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def gpm(source: Path, directory: Path, dimensions: int = 6) -> Path:
    """That Llama with random heads of a General Preference Model beside it."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, directory)
    weights = load_file(directory / "model.safetensors")
    hidden = weights["model.norm.weight"].shape[0]
    weights["value_head.weight"] = torch.randn(dimensions, hidden) / hidden**0.5
    weights["prompt_head.weight"] = torch.randn(dimensions // 2, hidden) / hidden**0.5
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def pairrm(directory: Path, size: str) -> Path:
    """A PairRM of that shape with random weights, in the published layout; <directory>/PairRM."""
    from safetensors.torch import save_file
    from transformers import DebertaV2Config, DebertaV2Tokenizer

    from sppo.rankers._pairrm_network import PairRMModel

    hidden, layers, heads, inner, words = DEBERTAS[size]
    pieces = [(special, 0.0) for special in ("[PAD]", "[CLS]", "[SEP]", "[UNK]")]
    pieces += [("▁" + word(i), -9.0) for i in range(words)]
    pieces += [(c, -20.0) for c in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = DebertaV2Tokenizer(vocab=pieces, unk_id=3, model_max_length=2048)
    config = DebertaV2Config(
        vocab_size=len(tokenizer) + 4,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=-1,
        position_biased_input=False,
        type_vocab_size=0,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = PairRMModel(config)
    (directory / "PairRM").mkdir(parents=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, directory / "PairRM" / "model.safetensors", metadata={"format": "pt"})
    settings = {"ranker_type": "pairranker", "model_type": "deberta", "model_name": "../base", "n_tasks": 1}
    settings |= {"source_maxlength": 1224, "candidate_maxlength": 412, "fp16": DEVICE == "cuda"}
    settings |= {"reduce_type": "linear", "inference_mode": "full", "loss_type": "instructgpt", "drop_out": 0.05}
    (directory / "PairRM" / "config.json").write_text(json.dumps(settings))
    return directory / "PairRM"


def prompts(path: Path, count: int) -> Path:
    """Prompts of 20 to 800 words, most of them short, as in UltraFeedback."""
    rng = random.Random(0)
    lines = [json.dumps({"prompt": f"{word(i)} {text(rng, 20, 110, 800)}"}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def training_rows(path: Path, count: int) -> int:
    """Rows of a train.parquet: such prompts, with answers of 30 to 1200 words; the number of words."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, rows, words = random.Random(0), [], 0
    for _ in range(count):
        asked = [{"role": "user", "content": text(rng, 20, 110, 800)}]
        sides = {
            side: [*asked, {"role": "assistant", "content": text(rng, 30, 300, 1200)}]
            for side in ("chosen", "rejected")
        }
        words += sum(len(turn["content"].split()) + 2 for side in sides.values() for turn in side)
        rows.append({**sides, "chosen_probs": 1.0, "chosen_probs_win": 1.0, "chosen_probs_lose": 0.0})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return words

"""The demo's world: a corpus, a small chat model, a small PairRM, prompts, and the rule behind them all.

Everything is made here, in about two minutes on two cores: a real Mistral with a real chat template, and a real
DeBERTa-v2 with PairRM's head. Answers say what somebody sees somewhere. The rule: more colour words are better.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from sppo.command.progress import progress
from sppo.rankers._pairrm_network import CANDIDATE, CANDIDATE1, CANDIDATE2, SOURCE, PairInputs, PairRMModel
from sppo.store.directories import appearing, target_of

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jacob Karla Leo Mia Noah Olga Paul Rosa Simon Tara Victor".split()
)
PLACES = (
    "in the garden,at the market,on the beach,in the kitchen,at the station,in the forest,on the hill,in the park,"
    "at the harbour,in the old town,on the farm,in the museum,by the river,in the library,at the fair,on the roof,"
    "in the workshop,at school,by the lake,in the attic"
).split(",")
THINGS = (
    "ball boat kite dog cat bird house door flower tree chair lamp book hat coat car train bridge cup table box flag "
    "bicycle ladder basket clock"
).split()
COLOURS = "red blue green yellow orange purple pink white black brown grey golden".split()
OTHERS = "small big old new round tall heavy broken clean wooden quiet strange little plain narrow soft".split()
QUESTIONS = ["What does {name} see {place}?", "Tell me what {name} sees {place}.", "{name} is {place}. What is there?"]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def colour_words(text: str) -> int:
    """How many colour words there are in a text."""
    return sum(word.strip(".,!?").lower() in COLOURS for word in text.split())


def rule(prompt: str, first: str, second: str) -> float:
    """The demo's judge, as a logit: the answer with more colour words is better, and as many is a tie."""
    difference = colour_words(first) - colour_words(second)
    return 50.0 if difference > 0 else -50.0 if difference < 0 else 0.0


CLASSES = 4  # of answers to `circle`: their leading colour is of the first, second or third kind, or there is none
# log-odds that a row's answer beats a column's: each kind beats the next, by a stake of its own, and all beat the last
CIRCLE = ((0.0, 2.0, -3.0, 2.0), (-2.0, 0.0, 1.0, 2.0), (3.0, -1.0, 0.0, 2.0), (-2.0, -2.0, -2.0, 0.0))


def colour_class(text: str) -> int:
    """Which of CLASSES an answer is of: the place of its first colour word in COLOURS, by threes."""
    colours = (COLOURS.index(w) for word in text.split() if (w := word.strip(".,!?").lower()) in COLOURS)
    return next(colours, -1) % 3 if colour_words(text) else CLASSES - 1


def circle(prompt: str, first: str, second: str) -> float:
    """A judge that goes round in a circle, as a logit: rock, paper, scissors over the answers' leading colours."""
    return CIRCLE[colour_class(first)][colour_class(second)]


def biased(prompt: str, first: str, second: str) -> float:
    """A judge that likes colour words, and length as much: a logit of 1 for a colour word, of 0.5 for any word."""
    longer = len(first.split()) - len(second.split())
    return colour_words(first) - colour_words(second) + 0.5 * longer


def all_prompts(rng: random.Random) -> list[tuple[str, str, str]]:
    """Every (question, name, place) in random order: 1200 prompts of one kind, no two alike."""
    made = [(q.format(name=n, place=p), n, p) for q, n, p in itertools.product(QUESTIONS, NAMES, PLACES)]
    rng.shuffle(made)
    return made


def answer(name: str, place: str, rng: random.Random) -> str:
    """An answer as the corpus has them: two to four things, three in ten of them with a colour."""
    things = []
    for thing in rng.sample(THINGS, rng.choice([2, 3, 3, 4])):
        kind = rng.random()
        adjective = rng.choice(COLOURS) if kind < 0.3 else rng.choice(OTHERS) if kind < 0.75 else ""
        words = " ".join(filter(None, [adjective, thing]))
        things.append(f"{'an' if words[0] in 'aeiou' else 'a'} {words}")
    return f"{name} sees {', '.join(things[:-1])} and {things[-1]} {place}."


def make_demo(directory: Path, seed: int, ranker: bool = True) -> None:
    """policy/, ranker/ (where wanted), train.jsonl (576 prompts), heldout.jsonl (150) and seed.json in `directory`,
    which appears when all of it is made."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    prompts = all_prompts(rng)
    with appearing(target_of(directory)) as final:
        for name, rows in (("heldout", prompts[:150]), ("train", prompts[150:726])):
            lines = [json.dumps({"prompt": question}) for question, _, _ in rows]
            (final / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        train_policy(final / "policy", prompts[150:], rng)
        if ranker:
            train_ranker(final / "ranker", prompts[150:], rng)
        (final / "seed.json").write_text(json.dumps(seed))


def train_policy(directory: Path, prompts: list[tuple[str, str, str]], rng: random.Random, steps: int = 450) -> None:
    """A Mistral of 0.7 million parameters that answers in the corpus's way."""
    from transformers import MistralConfig, MistralForCausalLM

    corpus = [(q, answer(n, p, rng)) for q, n, p in prompts for _ in range(8)]
    tokenizer = chat_tokenizer([f"{q} {a}" for q, a in corpus])
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = MistralForCausalLM(config)
    examples = []
    for question, text in corpus:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], return_dict=True)["input_ids"]
        reply = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        examples.append((prompt + reply, [-100] * len(prompt) + reply))

    def loss(batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([i + [0] * (width - len(i)) for i, _ in batch])  # (B, T)
        labels = torch.tensor([t + [-100] * (width - len(t)) for _, t in batch])
        return model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss

    _fit("chat model", model, examples, loss, steps, 3e-3, rng)
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def chat_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE with Mistral's special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def train_ranker(directory: Path, prompts: list[tuple[str, str, str]], rng: random.Random, steps: int = 500) -> None:
    """A PairRM in the published layout, trained on preferences that follow the rule."""
    from safetensors.torch import save_file
    from transformers import DebertaV2Config

    base = directory.parent / "ranker-base"
    corpus = [(q, answer(n, p, rng), answer(n, p, rng)) for q, n, p in prompts for _ in range(24)]
    tokenizer = ranker_tokenizer([text for row in corpus[:4000] for text in row])
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        relative_attention=True,
        position_buckets=64,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    config.vocab_size += len((SOURCE, CANDIDATE1, CANDIDATE2, CANDIDATE))
    model = PairRMModel(config)
    directory.mkdir(exist_ok=True)
    settings = {
        "ranker_type": "pairranker",
        "model_type": "deberta",
        "model_name": "../ranker-base",
        "n_tasks": 1,
        "source_maxlength": 1224,
        "candidate_maxlength": 412,
        "drop_out": 0.05,
    }
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")

    def save() -> None:
        weights = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    save()
    inputs = PairInputs(directory)
    rows = [
        (inputs.encode([{"role": "user", "content": question}], first, second), rule(question, first, second))
        for question, first, second in corpus
    ]

    def loss(batch: list[tuple[tuple[list[int], list[int]], float]]) -> torch.Tensor:
        target = torch.sigmoid(torch.tensor([wanted for _, wanted in batch]))  # (B,): 0, 1/2 or 1
        logits = model(*inputs.padded([p for p, _ in batch], "cpu"))
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, target)

    _fit("ranker", model, rows, loss, steps, 2e-3, rng)
    save()


def ranker_tokenizer(texts: list[str]) -> Any:
    """A Unigram tokenizer of DeBERTa-v2's kind: the corpus's words, and its characters for whatever else comes.

    Without the library's trainer, whose pieces differ from run to run, and with them the whole demo.
    """
    from transformers import DebertaV2Tokenizer

    found = Counter(
        w for text in texts for w in re.findall(r"\u2581?\w+|[^\w\u2581]", f" {text}".replace(" ", "\u2581"))
    )
    words = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    pieces = [(special, 0.0) for special in ("[PAD]", "[CLS]", "[SEP]", "[UNK]")]
    pieces += [(word, math.log(count / found.total())) for word, count in words]
    pieces += [(character, -20.0) for character in sorted({c for word in found for c in word} - found.keys())]
    return DebertaV2Tokenizer(vocab=pieces, unk_id=3, model_max_length=2048)


def _fit(
    label: str, model: torch.nn.Module, rows: list[Any], loss: Any, steps: int, rate: float, rng: random.Random
) -> None:
    """AdamW with a warm-up and a linear end, in batches of 64 rows of like length order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 50) * (1 - s / steps))
    model.train()
    with progress(steps, f"train the {label}", "step") as bar:
        for _ in range(steps):
            value = loss(rng.sample(rows, 64))
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix_str(f"loss {value.item():.3f}", refresh=False)
    model.eval()
    print(f"{label}: loss {value.item():.3f}")

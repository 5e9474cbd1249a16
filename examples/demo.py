"""The demo's world: prompts, a small chat model, a small PairRM, and the rule that the ranker was taught.

    What does Anna see in the garden?   ->   Anna sees a red ball, a small boat and a kite in the garden.

The rule: an answer with more colour words is better. The chat model has never heard of it; it answers as a corpus does,
in which three things in ten have a colour. The ranker has learned it from pairs of answers. In three iterations of SPPO
the model learns it from the ranker, and the report asks the rule itself (`--judge examples.demo:rule`) whether it did.

Everything is made here, in about two minutes on two cores, from the architectures of the paper: a Mistral with a chat
template, and a DeBERTa-v2 with PairRM's head. They are only smaller.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from examples import silence_libraries
from sppo.command.progress import progress
from sppo.rankers._pairrm_network import CANDIDATE, CANDIDATE1, CANDIDATE2, SOURCE, PairInputs, PairRMModel
from sppo.store.directories import appearing, target_of

Row = TypeVar("Row")

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


# Judges: functions of (prompt, first answer, second answer) that give a logit, above 0 where the first is better. Each
# is a ranker (--ranker examples.demo:rule) and a second judge (--judge examples.demo:rule).


def _colours_in(text: str) -> list[str]:
    """The colour words of a text, in order."""
    words = [word.strip(".,!?").lower() for word in text.split()]
    return [word for word in words if word in COLOURS]


def colour_words(text: str) -> int:
    """How many colour words there are in a text."""
    return len(_colours_in(text))


def rule(prompt: str, first: str, second: str) -> float:
    """The demo's rule: the answer with more colour words is better; with equally many it is a tie."""
    difference = colour_words(first) - colour_words(second)
    if difference == 0:
        return 0.0
    return 50.0 if difference > 0 else -50.0


def biased(prompt: str, first: str, second: str) -> float:
    """A judge that likes length too: a logit of 1 for each colour word more, and of 0.5 for each word more."""
    longer = len(first.split()) - len(second.split())
    return colour_words(first) - colour_words(second) + 0.5 * longer


def longer(prompt: str, first: str, second: str) -> float:
    """A ranker that can be fooled: it likes length alone, a logit of 0.5 for each word more."""
    return 0.5 * (len(first.split()) - len(second.split()))


LONGEST = 16  # words of an answer that `brief` does not find too long


def brief(prompt: str, first: str, second: str) -> float:
    """The rule, for a judge that length does not fool: each word beyond LONGEST costs half a colour word."""
    scores = [colour_words(text) - 0.5 * max(0, len(text.split()) - LONGEST) for text in (first, second)]
    return 50.0 * ((scores[0] > scores[1]) - (scores[0] < scores[1]))


CLASSES = 4  # of answers to `circle`: the first colour is of one of three kinds (0, 1, 2), or there is no colour (3)
# Log-odds that a row's class beats a column's: 0 beats 1, 1 beats 2, 2 beats 0, each by another stake; all beat 3.
CIRCLE = (
    (0.0, 2.0, -3.0, 2.0),
    (-2.0, 0.0, 1.0, 2.0),
    (3.0, -1.0, 0.0, 2.0),
    (-2.0, -2.0, -2.0, 0.0),
)


def circle(prompt: str, first: str, second: str) -> float:
    """A judge without a best answer: rock, paper, scissors with the answers' first colours."""
    return CIRCLE[colour_class(first)][colour_class(second)]


def colour_class(text: str) -> int:
    """The class of an answer: the place of its first colour in COLOURS, modulo 3; 3 without a colour."""
    colours = _colours_in(text)
    return COLOURS.index(colours[0]) % 3 if colours else CLASSES - 1


# The corpus.


def all_prompts(rng: random.Random) -> list[tuple[str, str, str]]:
    """Every (question, name, place), 1200 in all, in random order."""
    made = [(q.format(name=n, place=p), n, p) for q, n, p in itertools.product(QUESTIONS, NAMES, PLACES)]
    rng.shuffle(made)
    return made


def answer(name: str, place: str, rng: random.Random) -> str:
    """An answer of the corpus: two to four things, of which 30% have a colour, and 45% another adjective."""
    things = []
    for thing in rng.sample(THINGS, rng.choice([2, 3, 3, 4])):
        kind = rng.random()
        if kind < 0.3:
            thing = f"{rng.choice(COLOURS)} {thing}"
        elif kind < 0.75:
            thing = f"{rng.choice(OTHERS)} {thing}"
        article = "an" if thing[0] in "aeiou" else "a"
        things.append(f"{article} {thing}")
    return f"{name} sees {', '.join(things[:-1])} and {things[-1]} {place}."


def make_demo(directory: Path, seed: int, ranker: bool = True) -> None:
    """Write the world into `directory`, which appears when all of it is made.

    It holds policy/, ranker/ (unless `ranker` is false), train.jsonl (576 prompts), heldout.jsonl (150), seed.json.
    """
    silence_libraries()
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
    """Train a Mistral of 0.7 million parameters to answer as the corpus does: the policy before any SPPO."""
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

    examples = []  # (token ids of prompt and answer, labels): the loss is of the answer alone
    for question, text in corpus:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], return_dict=True)["input_ids"]
        reply = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        examples.append((prompt + reply, [-100] * len(prompt) + reply))

    def loss(batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([i + [0] * (width - len(i)) for i, _ in batch])  # (B, T)
        labels = torch.tensor([t + [-100] * (width - len(t)) for _, t in batch])  # (B, T)
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
    """Train a PairRM on pairs of answers to tell which has more colour words, and save it in the published layout."""
    corpus = [(q, answer(n, p, rng), answer(n, p, rng)) for q, n, p in prompts for _ in range(24)]
    tokenizer = ranker_tokenizer([text for row in corpus[:4000] for text in row])
    model = _new_ranker(directory, tokenizer)
    inputs = PairInputs(directory)
    rows = [
        (inputs.encode([{"role": "user", "content": question}], first, second), rule(question, first, second))
        for question, first, second in corpus
    ]

    def loss(batch: list[tuple[tuple[list[int], list[int]], float]]) -> torch.Tensor:
        target = torch.sigmoid(torch.tensor([logit for _, logit in batch]))  # (B,): 0, 1/2 or 1
        logits = model(*inputs.padded([pair for pair, _ in batch], "cpu"))
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, target)

    _fit("ranker", model, rows, loss, steps, 2e-3, rng)
    _save_ranker(model, directory)


def _new_ranker(directory: Path, tokenizer: Any) -> PairRMModel:
    """An untrained PairRM, saved in the published layout: ranker/ with the weights, ranker-base/ with the tokenizer."""
    from transformers import DebertaV2Config

    base = directory.parent / "ranker-base"
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

    config.vocab_size += len((SOURCE, CANDIDATE1, CANDIDATE2, CANDIDATE))  # the tokens that PairRM adds
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
    _save_ranker(model, directory)
    return model


def _save_ranker(model: PairRMModel, directory: Path) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def ranker_tokenizer(texts: list[str]) -> Any:
    """A Unigram tokenizer like DeBERTa-v2's: a piece for each word of the corpus, and for each of its characters.

    It does without the library's trainer, whose pieces differ from run to run; then the whole demo would differ.
    """
    from transformers import DebertaV2Tokenizer

    found: Counter[str] = Counter()
    for text in texts:
        marked = f" {text}".replace(" ", "\u2581")  # a space belongs to the word behind it
        found.update(re.findall(r"\u2581?\w+|[^\w\u2581]", marked))
    words = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    pieces = [(special, 0.0) for special in ("[PAD]", "[CLS]", "[SEP]", "[UNK]")]
    pieces += [(word, math.log(count / found.total())) for word, count in words]
    pieces += [(character, -20.0) for character in sorted({c for word in found for c in word} - found.keys())]
    return DebertaV2Tokenizer(vocab=pieces, unk_id=3, model_max_length=2048)


def _fit(
    label: str,
    model: torch.nn.Module,
    rows: list[Row],
    loss: Callable[[list[Row]], torch.Tensor],
    steps: int,
    rate: float,
    rng: random.Random,
) -> None:
    """Minimise `loss` over random batches of 64 rows: AdamW, 50 steps of warm-up, then a linear decay to 0."""
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

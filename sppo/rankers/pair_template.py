"""The question that a pair-lm is asked: two presets, and templates of the user's, with nothing in a text forged.

`judge` is our judge's question. `rlhflow` is that of RLHFlow/pair-preference-model-LLaMA3-8B, read as its authors'
example reads it (pair-pm/README.md of RLHFlow/RLHF-Reward-Modeling): without any BOS. Any other name is a file with the
fields {conversation}, {first} and {second}; it is one user turn.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sppo.rankers.templates import fill, load_template, read_template, without_control
from sppo.schema import Message, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIELD = re.compile(r"\{(\w+)\}")
RLHFLOW = "[CONTEXT] {conversation} [RESPONSE A] {first} [RESPONSE B] {second} \n"
# in the judge's question texts stand between tags with codes: see templates.fill
PRESETS = {"judge": load_template("letter", "--ranker_template"), "rlhflow": RLHFLOW}


def question_text(name: str) -> str:
    """The text of a preset or a file. Raises UsageError for a file that is not there, or without one of its fields."""
    return PRESETS[name] if name in PRESETS else read_template(name, "--ranker_template", [*PRESETS])


class Question:
    """A template, and how texts are put into it for a tokenizer.

    name: as in --ranker_template. A text cannot forge a turn: a space parts the name of a control token in it. Nor can
    it forge another text's beginning: the same is done to what a template has before and behind its fields. shown: how
    many times a response stands in a question: 2, or more where a template repeats a field.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.template = name, question_text(name)
        self.shown = sum(field in ("first", "second") for field in _FIELD.findall(self.template))
        added = tokenizer.added_tokens_decoder.values()
        control = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        marks = ["<turn>", *_marks(self.template)] if name == "rlhflow" else _marks(self.template)
        parts = [re.escape(text) for text in sorted(control, key=len, reverse=True) if len(text) > 1]
        parts += [rf"(?<!\w){re.escape(mark)}" for mark in marks]
        self.forgeable = re.compile("|".join(parts) or r"(?!)")

    def harmless(self, text: str) -> str:
        """A text in which a space parts all that could be taken for something else than text."""
        return without_control(self.forgeable.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text))

    def conversation(self, prompt: list[Message]) -> str:
        """A prompt as the template shows it."""
        if self.name != "rlhflow":
            return self.harmless(prompt_text(prompt))
        messages = prompt
        if len(prompt) > 1 and prompt[0]["role"] == "system":  # which the model has never seen
            messages = [{"role": "user", "content": prompt_text(prompt[:1] + prompt[1:2])}, *prompt[2:]]
        turns = [f"\n<turn> {m['role']}\n {self.harmless(m['content'])}" for m in messages]
        return "\n" + "".join(turns) + "\n"

    def ask(self, conversation: str, first: str, second: str) -> str:
        """The user turn. `conversation`: what conversation() gives, or its end; the responses as they are."""
        texts = {"conversation": conversation, "first": self.harmless(first), "second": self.harmless(second)}
        if self.name == "judge":
            return fill(self.template, **texts)
        return _FIELD.sub(lambda field: texts.get(field[1], field[0]), self.template)


def _marks(template: str) -> list[str]:
    """What stands next to the fields of a template, on the same line or the nearest one: [RESPONSE A], say."""
    found = []
    for part in _FIELD.split(template)[::2]:  # what is between the fields
        lines = [line.strip() for line in part.splitlines() if len(line.strip()) > 1]
        found += lines[:1] + lines[-1:]
    return sorted(set(found), key=len, reverse=True)

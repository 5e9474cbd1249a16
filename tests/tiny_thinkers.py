"""Tiny models that think: chains of tokens, by weights that are written and not trained.

Attention and feed-forward are nothing, so a token alone decides what may follow it. A thought has words that no answer
has, so a text of either kind is known by its words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tiny

MUSING = ["hmm", "well", "maybe", "perhaps"]  # words of thoughts
SAYING = ["red", "blue", "green", "yellow"]  # words of answers
_TURN = "'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'"


def _template(opened: str, ending: str, prompt: str, off: str = "") -> str:
    """A template that writes a thought between these, ends prompts with `prompt`, and `off` without thinking."""
    off = f"{{% if enable_thinking is defined and not enable_thinking %}}{{{{ '{off}' }}}}{{% endif %}}" if off else ""
    return (
        "{% for message in messages %}{% if message['role'] == 'assistant' and message['reasoning_content'] %}"
        f"{{{{ '<|im_start|>assistant\n{opened}' + message['reasoning_content'] + '{ending}' + message['content'] "
        f"+ '<|im_end|>\n' }}}}{{% else %}}{{{{ {_TURN} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n{prompt}' }}}}{off}{{% endif %}}"
    )


class Kind(NamedTuple):
    """A kind of template. written: what the model writes before, between and behind thought and answer."""

    template: str
    special: list[str]  # marks that are one token each
    opens: str
    ending: str


THINK = ["<think>", "</think>"]
CHANNELS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]
_FINAL = "<|channel|>final<|message|>"
_CHANNELS_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% if message['thinking'] %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + message['thinking'] + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] + '<|im_end|>' }}{% else %}"
    "{{ '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
KINDS = {
    "special": Kind(
        _template("<think>\n", "\n</think>\n\n", "", "<think>\n\n</think>\n\n"), THINK, "<think>\n", "\n</think>\n\n"
    ),
    "plain": Kind(_template("<ponder>", "[done]", ""), [], "<ponder>", "[done]"),
    "opened": Kind(_template("<think>\n", "\n</think>\n\n", "<think>\n", "</think>\n\n"), THINK, "", "\n</think>\n\n"),
    "channels": Kind(
        _CHANNELS_TEMPLATE, CHANNELS, "<|channel|>analysis<|message|>", f"<|end|><|start|>assistant{_FINAL}"
    ),
}


def _allowed(kind: str) -> dict[str, list[str]]:
    """Which tokens follow a token, each as likely. A token that is not named here is a prompt's."""
    musing, saying = [f" {word}" for word in MUSING], [f" {word}" for word in SAYING]
    ends = {"special": "</think>", "opened": "</think>", "plain": "[", "channels": "<|end|>"}
    said = [*saying[1:], "<|im_end|>"]
    allowed = {word: [*musing, ends[kind]] for word in musing} | dict.fromkeys(saying, said)
    if kind == "plain":
        allowed |= {"\n": ["<"], "<": ["ponder"], "ponder": [">"], ">": musing}
        return allowed | {"[": ["done"], "done": ["]"], "]": saying[:1]}
    if kind == "channels":
        allowed |= {"assistant": ["<|channel|>"], "analysis": ["<|message|>"], "final": ["<|message|>"]}
        return allowed | {"<|end|>": ["<|start|>"], "<|start|>": ["assistant"]}
    opens = {"\n": ["<think>"], "<think>": musing} if kind == "special" else {"\n": musing}
    return allowed | opens | {"</think>": ["\n\n"], "\n\n": saying[:1]}


def thinker(directory: Path, kind: str) -> Path:
    """A Llama that thinks in words of MUSING, five on average, and then says words of SAYING.

    kind: of KINDS. After gpt-oss's <|channel|> and <|message|> what has been written decides: attention that looks at
    all tokens alike tells it whether there was an `analysis` and a `final`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    of = KINDS[kind]
    words = [*_allowed(kind), *(f" {word}" for word in (*MUSING, *SAYING)), "analysis", "final", "assistant", "\n\n"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *of.special]
    fast = tiny.tokenizer(
        special,
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        of.template,
        adds_bos=False,
        more=words * 50,
    )
    config = LlamaConfig(**{**tiny.shape(fast), "num_hidden_layers": 1, "num_key_value_heads": 4})
    tiny.save(directory, LlamaForCausalLM, config, fast, [fast.eos_token_id])

    def token(text: str) -> int:
        (found,) = fast(text, add_special_tokens=False)["input_ids"]
        return found

    model: Any = LlamaForCausalLM.from_pretrained(directory)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.zero_()
    embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embedding[:, 0] = 1  # a prompt's token
    for state, (text, followers) in enumerate(_allowed(kind).items(), 1):
        embedding[token(text)] = torch.nn.functional.one_hot(torch.tensor(state), 64).float()
        head[[token(follower) for follower in followers], state] = 100_000
    if kind == "channels":
        attention = model.model.layers[0].self_attn
        # each logit beats those before it, whatever share of the tokens a word has that has been seen
        for state, (text, first, logit) in enumerate(
            [("<|channel|>", "analysis", 5), ("<|message|>", " hmm", 500)], 50
        ):
            embedding[token(text)] = torch.nn.functional.one_hot(torch.tensor(state), 64).float()
            head[token(first), state] = logit
        for feature, (seen, then, logit) in enumerate([("analysis", "final", 20), ("final", " red", 2000)]):
            attention.v_proj.weight.data[feature] = embedding[token(seen)]
            attention.o_proj.weight.data[60 + feature, feature] = 15
            head[token(then), 60 + feature] = logit
    model.save_pretrained(directory)
    return directory

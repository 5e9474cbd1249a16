"""Conversations to token ids, by the model's own tokenizer and chat template and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.command.errors import FOREIGN, SPPOError, with_code_hint
from sppo.command.importing import import_networks
from sppo.command.stopping import time_limit
from sppo.models.dates import clock, fix_date
from sppo.schema import THOUGHT_FIELDS, Message
from sppo.store.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# why a conversation with a thought in a field cannot be rendered
NO_THOUGHT = (
    f"the chat template reads no thought in {', '.join(THOUGHT_FIELDS)}: leave it out, write it into the content as "
    "the model writes it, or take a template that reads it"
)
TEMPLATE_SECONDS = 60  # of computing that a chat template may take for one conversation


def load_tokenizer(directory: Path, remote_code: bool = False, date: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; its own code runs only with `remote_code`. `date`: see dates.py.

    Raises SPPOError if it has none, or no chat template.
    """
    import_networks()  # which transformers imports for a tokenizer too
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=remote_code)
    except FOREIGN as error:  # tokenizers raises bare Exceptions
        raise SPPOError(f"model {directory}: its tokenizer cannot be loaded: {with_code_hint(error)}") from None
    if not tokenizer.chat_template:
        raise SPPOError(
            f"model {directory} has no chat template, so it is no chat model. Start from its instruct version, "
            "or put a chat_template.jinja into the directory."
        )
    fix_date(tokenizer, date)
    return tokenizer


def with_system(tokenizer: PreTrainedTokenizerBase, messages: list[Message], system_prompt: str) -> list[Message]:
    """`messages` as the template takes them: `system_prompt` in front where there is no system turn, and the
    system turn folded into the first user turn where the template refuses or ignores one (Gemma-2, Mistral 0.2).

    Raises ValueError for a turn that the template would leave out without a word: of a tool most often, or a system
    turn that does not come first.
    """
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    if messages[0]["role"] == "system" and not takes_system(tokenizer):
        if len(messages) < 2 or messages[1]["role"] != "user":
            raise ValueError("a system turn without a user turn behind it")
        folded = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        messages = [folded, *messages[2:]]
    left_out = _left_out(tokenizer, tuple(m["role"] for m in messages))
    if left_out == "system":
        raise ValueError("the chat template leaves out a system turn that does not come first")
    if left_out == "user":
        raise ValueError("the chat template leaves out what the user says")
    if left_out:
        raise ValueError("the chat template leaves out turns of a role that it does not know")
    return messages


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template renders a system turn's text. Asked of the template itself, once."""
    known = tokenizer.__dict__
    if "_sppo_takes_system" not in known:
        probe = [{"role": "system", "content": "system-probe"}, {"role": "user", "content": "user-probe"}]
        try:
            known["_sppo_takes_system"] = "system-probe" in render(tokenizer, probe, True)
        except ValueError:
            known["_sppo_takes_system"] = False
    return known["_sppo_takes_system"]


def _left_out(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> str:
    """The role of a turn that the template leaves out of a conversation with such roles; "" for none.

    Not asked of the assistant's turns, whose thoughts templates rightly leave out, nor of a system turn in front. A
    conversation that the template refuses is refused where it is rendered. Asked once for each sequence of roles.
    """
    asked = [i for i, role in enumerate(roles) if role != "assistant" and (role != "system" or i)]
    known = tokenizer.__dict__.setdefault("_sppo_left_out", {})
    if roles not in known:
        texts, probe = probe_of(roles)
        try:
            rendered = render(tokenizer, probe, True)
            known[roles] = next((roles[i] for i in asked if texts[i] not in rendered.lower()), "")
        except ValueError:
            known[roles] = ""
    return known[roles]


def probe_of(roles: tuple[str, ...]) -> tuple[list[str], list[Message]]:
    """(a content for each role, which no template writes by itself; the conversation of them)."""
    texts = [f"turn{i}probe" for i in range(len(roles))]
    return texts, [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """Token ids of the prompt, up to and with the assistant's header: one BOS, the template's own.

    Raises ValueError where the template refuses the conversation (roles that do not alternate, say).
    """
    return conversation_ids(tokenizer, messages, True, template_kwargs)


def response_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    response: str | Message,
    stop_ids: set[int],
    template_kwargs: dict[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids) of a finished conversation whose generated token ids are not known.

    response: a text, or the assistant's turn with a thought (see answer_turn), for a template that takes it.
    The response ends with the template's own end token, once; what a template puts behind that (a newline)
    is never generated and so not trained on. Raises ValueError where the template does not keep the prompt.
    """
    prompt = prompt_ids(tokenizer, messages, template_kwargs)
    turn = answer_turn(response) if isinstance(response, str) else response
    whole = conversation_ids(tokenizer, [*messages, turn], False, template_kwargs)
    if whole[: len(prompt)] != prompt:
        raise ValueError("the chat template renders the prompt differently once it is answered")
    ids = whole[len(prompt) :]
    ends = [i for i, token in enumerate(ids) if token in stop_ids]
    return prompt, ids[: ends[-1] + 1] if ends else ids


def answer_turn(response: str, thought: str = "") -> Message:
    """The assistant's turn of a response."""
    turn = {"role": "assistant", "content": response}
    return {**turn, "reasoning_content": thought} if thought else turn


def without_end(tokenizer: PreTrainedTokenizerBase, text: str, stop_ids: set[int]) -> str:
    """An answer without the ends of turn that its text spells behind it, nor white space behind those.

    The template puts its own end there, once. An id that is no token of the tokenizer spells nothing.
    """
    ends = tuple(end for end in (str(tokenizer.decode([i])) for i in stop_ids) if end)
    left = text
    while (stripped := left.rstrip()).endswith(ends):
        left = stripped[: -max(len(end) for end in ends if stripped.endswith(end))]
    return left


def template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the template; of all of them where a model has several, each with a name."""
    named = tokenizer.chat_template
    return "\n".join(named.values()) if isinstance(named, dict) else named


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool,
    template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of the conversation in the template. Raises ValueError where the template refuses it."""
    return list(_applied(tokenizer, messages, add_generation_prompt, template_kwargs, return_dict=True)["input_ids"])


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool,
    template_kwargs: dict[str, Any] | None = None,
) -> str:
    """The conversation as the template's text. Raises ValueError where the template refuses it."""
    return _applied(tokenizer, messages, add_generation_prompt, template_kwargs, tokenize=False)


def _applied(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool,
    template_kwargs: dict[str, Any] | None,
    **how: bool,
) -> Any:
    try:
        with _in_time(tokenizer):
            return tokenizer.apply_chat_template(
                _as_template_reads(tokenizer, messages),
                add_generation_prompt=add_generation_prompt,
                **how,
                **{**clock(tokenizer), **(template_kwargs or {})},
            )
    except (SPPOError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - a template raises what Python does: a range too big, a division by 0
        raise ValueError(f"the chat template refuses it: {error}") from None


def _in_parts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The roles whose contents the template reads as a list of parts only, and would drop a text. Asked of it once."""
    known = tokenizer.__dict__
    if "_sppo_in_parts" not in known:
        found = known["_sppo_in_parts"] = set()  # what is rendered below uses what is known so far
        for role, roles in (("user", ("user",)), ("system", ("system", "user")), ("assistant", ("user", "assistant"))):
            if not _is_read(tokenizer, role, roles):
                found.add(role)
                if not _is_read(tokenizer, role, roles):
                    found.remove(role)
    return known["_sppo_in_parts"]


def _is_read(tokenizer: PreTrainedTokenizerBase, role: str, roles: tuple[str, ...]) -> bool:
    """Whether the template writes the content of a role as it is, and not Python's words for a list."""
    texts, probe = probe_of(roles)
    text = texts[roles.index(role)]
    try:
        rendered = render(tokenizer, probe, False)
    except ValueError:
        return False
    return text in rendered and f"'text': '{text}" not in rendered


def thought_field(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where the template reads the thought of the last assistant's turn: a field of THOUGHT_FIELDS, or "part", for a
    part of the content as in Magistral's; "" where it reads it nowhere. Asked of the template itself, once.

    Whether it writes the thoughts of earlier turns is its own affair; most leave them out.
    """
    known = tokenizer.__dict__
    if "_sppo_thought_field" not in known:
        texts, probe = probe_of(("user", "assistant"))
        probe[1]["reasoning_content"] = thought = "thought-probe"
        for name in (*THOUGHT_FIELDS, "part", ""):
            known["_sppo_thought_field"] = name  # what is rendered below uses what is known so far
            try:
                rendered = render(tokenizer, probe, False) if name else ""
            except ValueError:
                continue
            if thought in rendered and texts[1] in rendered and not is_printed(thought, rendered):
                break
    return known["_sppo_thought_field"]


def is_printed(text: str, rendered: str) -> bool:
    """Whether a template has written the field of a text as Python or JSON prints it, and not the text alone."""
    return bool(re.search(rf"""["']: ?["']{text}""", rendered))


def _as_template_reads(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[dict[str, Any]]:
    """Messages with the contents and the thoughts where the template reads them.

    Raises ValueError for a thought where it reads none.
    """
    parts, made = _in_parts(tokenizer), []
    for message in messages:
        turn: dict[str, Any] = dict(message)
        if message["role"] in parts:
            turn["content"] = [{"type": "text", "text": message["content"]}]
        if (thought := turn.pop("reasoning_content", "")) and not (field := thought_field(tokenizer)):
            raise ValueError(NO_THOUGHT)
        if thought and field == "part":
            text = {"type": "text", "text": message["content"]}
            turn["content"] = [{"type": "thinking", "thinking": thought}, text]
        elif thought:
            turn[field] = thought
        made.append(turn)
    return made


def _in_time(tokenizer: PreTrainedTokenizerBase) -> AbstractContextManager[None]:
    """jinja bounds a range, but no loops inside of each other."""
    return time_limit(
        TEMPLATE_SECONDS,
        f"the chat template of {tokenizer.name_or_path} has not rendered a conversation within {TEMPLATE_SECONDS} s: "
        "it may loop for ever. Take the model's own template, or mend this one",
    )


def stop_token_ids(directory: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a response: generation_config.json's eos_token_id, else config.json's, and the tokenizer's."""
    stops: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if stops or not path.exists():
            continue
        config = read_json(path)
        eos: Any = config.get("eos_token_id") if isinstance(config, dict) else "no object"
        found = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in found):
            raise SPPOError(f"{path} is damaged: its eos_token_id is {eos!r}, not a token id; fetch the model again")
        stops.update(found)
    own: Any = tokenizer.eos_token_id
    if own is not None:
        stops.add(own)
    if not stops:
        raise SPPOError(
            f"model {directory}: no end-of-sequence token in generation_config.json, config.json or the tokenizer"
        )
    return stops


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary, the added tokens and the template: equal means equal token ids."""
    sha = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        sha.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    sha.update(json.dumps(tokenizer.chat_template).encode())
    sha.update(repr([tokenizer.bos_token_id, tokenizer.eos_token_id]).encode())
    return sha.hexdigest()[:32]

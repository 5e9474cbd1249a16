"""The contract between the stages: what a prompt is, and the columns of every file that one stage leaves to another.

    generation -> responses.parquet -> ranking -> ranking/*.parquet -> pairing -> train.parquet -> training

Files written by other tools work too. They need the columns of REQUIRED; the other columns are optional. Training on
plain pairs (--loss_type sigmoid, hinge, ipo, ipo_mean, kto_pair) needs chosen and rejected alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

# Nats a token by which the log-probs of engine and trainer may differ for the same tokens: some three times what
# bfloat16 and float32 differ by (docs/benchmarks.md).
AGREEING = 0.02
# The share of the responses whose thought did not end, so that they have no answer, above which a warning is given.
MANY_UNFINISHED = 0.05

if TYPE_CHECKING:
    import pyarrow as pa

# {"role": ..., "content": ...}, and "reasoning_content" where an assistant's turn has a thought beside its content
Message = dict[str, str]
Pair = tuple[list[Message], str, str]  # (prompt, the response shown first, the response shown second)

# What chat templates read of a message beside role and content. None of it is handed on, so none may be lost silently.
BEYOND_TEXT = (
    "tool_calls tool_call_id function_call tool_plan tool_responses name "
    "images image videos video audio documents attachments"
).split()
# Where tools keep an assistant's thought, and chat templates read it. Here it is always the first.
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
# The usual marks of a thought that stands in a content. A template may have written the first one into the prompt.
THOUGHT_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
# The same of a row, in columns beside its conversation.
BESIDE = "tools images image videos video audio documents chat_template_kwargs".split()
# How a prompt begins and ends as text of the usual chat templates. Both must be there: that is hardly ever by chance.
_BOS = r"(<s>|<bos>|<BOS_TOKEN>|<\|begin_of_text\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>|\[gMASK\]<sop>)?\s*"
_THINK = r"\s*(<think>)?\s*(</think>)?"  # may be open, or closed at once
_TEMPLATES = [
    (  # ChatML, as Qwen's; Phi-4
        r"<\|im_start\|>(system|user)(\n|<\|im_sep\|>)",
        rf"(<\|im_end\|>|<\|im_start\|>assistant(<\|im_sep\|>)?{_THINK})",
    ),
    # Llama-3, Llama-4
    (r"<\|start_header_id\|>(system|user)<\|", r"(<\|eot_id\|>|<\|start_header_id\|>assistant<\|end_header_id\|>)"),
    (r"<\|header_start\|>(system|user)<\|", r"(<\|eot\|>|<\|header_start\|>assistant<\|header_end\|>)"),
    (r"(\[SYSTEM_PROMPT\].*\[/SYSTEM_PROMPT\]\s*)?\[INST\]", r"\[/INST\]"),  # Llama-2, Mistral
    (r"<start_of_turn>user\n", r"(<end_of_turn>|<start_of_turn>model)"),  # Gemma
    (r"<\|(system|user)\|>", rf"(<\|assistant\|>{_THINK}|<\|end\|>|</s>)"),  # Zephyr, Phi, GLM
    (r"(<｜begin▁of▁sentence｜>[^<]*)?<｜User｜>", rf"<｜Assistant｜>{_THINK}"),  # DeepSeek
    (r"<\|START_OF_TURN_TOKEN\|>", r"(<\|END_OF_TURN_TOKEN\|>|<\|CHATBOT_TOKEN\|>(<\|\w+\|>)?)"),  # Cohere
    # gpt-oss
    (r"<\|start\|>(system|developer|user)<\|message\|>", r"(<\|end\|>|<\|start\|>assistant(<\|channel\|>.{0,40})?)"),
    (r"<\|start_of_role\|>", r"(<\|end_of_text\|>|<\|start_of_role\|>assistant[^|]{0,60}<\|end_of_role\|>)"),  # Granite
    (r"(A chat between [^\n]{0,300}\s)?USER: ", r"\sASSISTANT:"),  # Vicuna
    (r"(Below is an instruction [^\n]{0,200}\n+)?### Instruction:\n", r"\n### Response:"),  # Alpaca
    (r"Human: ", r"\n\nAssistant:"),  # HH-RLHF
]
_IN_A_TEMPLATE = re.compile(_BOS + "(" + "|".join(f"{begin}.*{end}" for begin, end in _TEMPLATES) + ")", re.DOTALL)
_ROLE_KEY = re.compile(r"[\"'](role|from)[\"']\s*:")
_SHAREGPT = {"human": "user", "gpt": "assistant"}

REQUIRED = {
    "responses": ["prompt_id", "prompt", "responses"],
    "ranking": ["prompt_id", "logits"],
    "train": ["chosen", "rejected", "chosen_probs", "chosen_probs_win", "chosen_probs_lose"],
}
MEANING = {
    "prompt_id": "the prompt's id, the same in all files; rows are joined by it, never by their position",
    "prompt": "the conversation up to the response, as messages {role, content}",
    "responses": "the K responses, those of other models last: text, token_ids (the stop token included), "
    "finish_reason (stop or length), logps (for a sample of the prompts: the engine's log-probability of each token, "
    "before temperature and top_p), thought (what a model that thinks wrote before its answer; null without one), "
    "thought_tokens (how many of token_ids come before the answer's first; all of them where the thought did not end "
    "and there is no answer). text is the answer alone",
    "prompt_token_ids": "the prompt as the policy read it",
    "prompt_thoughts": "where earlier turns of the prompt have thoughts: the thought of each turn, else null",
    "tokenizer": "fingerprint of the tokenizer that made the token ids",
    "logits": "K x K; row i, column j: how strongly the ranker prefers response i to j when i is shown first; 0 where "
    "one of the two has no answer, for which the ranker is not asked",
    "scores": "one score a response: the mean over j of logits[i][j] - logits[j][i], over those with an answer; null "
    "for a response without one",
    "chosen": "the conversation with the best response",
    "rejected": "the conversation with the worst response, or with what --select took instead",
    "chosen_probs": "P(chosen > rejected)",
    "chosen_probs_win": "P(chosen > policy): the chosen response's mean win rate over the K responses",
    "chosen_probs_lose": "P(rejected > policy): the rejected response's mean win rate over the K responses",
    "chosen_index": "which of the K responses is the chosen one",
    "rejected_index": "which of the K responses is the rejected one",
    "probability": "K x K win rates, row against column, after any temperature and length penalty; a response with an "
    "answer beats one without in every comparison",
    "rm_scores": "the ranking's scores, without any temperature or length penalty",
}


def responses_schema() -> pa.Schema:
    """Columns of responses.parquet and of its shards."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    response = pa.struct(
        [
            ("text", pa.string()),
            ("token_ids", pa.list_(pa.int32())),
            ("finish_reason", pa.string()),
            ("logps", pa.list_(pa.float32())),
            ("thought", pa.string()),
            ("thought_tokens", pa.int32()),
        ]
    )
    return pa.schema(
        [
            ("prompt_id", pa.string()),
            ("prompt", pa.list_(message)),
            ("responses", pa.list_(response)),
            ("prompt_token_ids", pa.list_(pa.int32())),
            ("tokenizer", pa.string()),
            ("prompt_thoughts", pa.list_(pa.string())),
        ]
    )


def ranking_schema() -> pa.Schema:
    """Columns of ranking/shard-*.parquet: logits (K, K), scores (K,)."""
    import pyarrow as pa

    matrix = pa.list_(pa.list_(pa.float32()))
    return pa.schema([("prompt_id", pa.string()), ("logits", matrix), ("scores", pa.list_(pa.float32()))])


def training_schema() -> pa.Schema:
    """Columns of train.parquet and test.parquet: the five of the released data sets, then ours."""
    import pyarrow as pa

    answers = responses_schema()
    conversation = answers.field("prompt").type
    return pa.schema(
        [
            ("chosen", conversation),
            ("rejected", conversation),
            ("chosen_probs", pa.float64()),
            ("chosen_probs_win", pa.float64()),
            ("chosen_probs_lose", pa.float64()),
            ("prompt_id", pa.string()),
            ("prompt", conversation),
            ("responses", answers.field("responses").type),
            ("chosen_index", pa.int32()),
            ("rejected_index", pa.int32()),
            ("probability", pa.list_(pa.list_(pa.float64()))),
            ("rm_scores", pa.list_(pa.float32())),
            ("prompt_token_ids", pa.list_(pa.int32())),
            ("tokenizer", pa.string()),
            ("prompt_thoughts", pa.list_(pa.string())),
        ]
    )


NO_ANSWER = "no response has an answer: no thought ended"  # why a prompt is left out


def has_answer(response: dict[str, Any]) -> bool:
    """Whether a response has an answer, be it an empty one: not where its thought did not end."""
    thought_tokens = response.get("thought_tokens")
    return thought_tokens is None or thought_tokens < len(response.get("token_ids") or [])


def answered_of(responses: list[dict[str, Any] | None]) -> list[int]:
    """Which of a prompt's responses have an answer: their places. One that is null has an empty one."""
    return [i for i, response in enumerate(responses) if response is None or has_answer(response)]


def answer_tokens(response: dict[str, Any]) -> int:
    """How many tokens a response's answer has, its thought not counted."""
    return len(response.get("token_ids") or []) - (response.get("thought_tokens") or 0)


def content_id(value: Any) -> str:
    """16 hex digits of the sha256 of a prompt's content: its id where the source has none."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def prompt_text(messages: list[Message]) -> str:
    """A prompt as the plain text that a ranker reads: the user's words; earlier turns, if any, each after its role.

    Without the thoughts of earlier turns.
    """
    messages = apart(messages).messages
    if len(messages) == 1:
        return messages[0]["content"]
    if [m["role"] for m in messages] == ["system", "user"]:
        return f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return "\n".join(f"{m['role'].upper()}: {m['content']}" for m in messages)


class BeyondTextError(ValueError):
    """A conversation with more than roles and texts, which are all that the stages hand on: it cannot be used whole."""


def as_messages(value: Any) -> list[Message]:
    """A conversation, as any tool writes it, as messages {role, content} with plain texts.

    Text parts ([{"type": "text", "text": ...}]) are joined; ShareGPT's from and value become role and content. An
    assistant's thought, in a field of THOUGHT_FIELDS or in parts before its text, becomes `reasoning_content`. Raises
    BeyondTextError for a message with a field of BEYOND_TEXT or a part that is an image or the like, and ValueError for
    what is no text.
    """
    if not isinstance(value, list):
        raise ValueError("no list of messages")
    if not value:
        raise ValueError("empty")
    return [_message(turn) for turn in value]


def beyond_text(row: dict[str, Any]) -> str:
    """Why a row cannot be used whole: a column of BESIDE that holds something. "" where there is none."""
    for name in BESIDE:
        value = _parsed(row.get(name))
        if _describes_functions(value) if name == "tools" else _holds(value):
            return f"the row has {name}, which this pipeline does not hand on"
    return ""


def _parsed(value: Any) -> Any:
    """What a text of JSON holds, as data sets write what has no fixed fields; else the value itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _describes_functions(value: Any) -> bool:
    """Whether a column `tools` describes functions, as chat templates read them; a list of words does not."""
    tools = value if isinstance(value, list) else [value]
    return any(isinstance(tool, dict) and _holds(tool) for tool in map(_parsed, tools))


def _holds(value: Any) -> bool:
    """Whether there is something in a value; pyarrow fills other rows' fields with None."""
    if isinstance(value, dict):
        return any(map(_holds, value.values()))
    return any(map(_holds, value)) if isinstance(value, list) else value not in (None, "")


def with_own_system(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    """A row's conversation with its column `system` in front, where it has such a text and no system turn."""
    system = row.get("system")
    if not (system and is_text(system)) or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def written_out(messages: list[Message]) -> str:
    """Why a conversation's only turn cannot be taken as a user's text, because it is more than that. "" where it can.

    It is a prompt in one of the usual chat templates, or a list of messages as JSON or as Python prints it, as CSV
    files hold conversations.
    """
    text = only_text(messages)
    if _IN_A_TEMPLATE.fullmatch(text):
        return "in a chat template already"
    inside = text.removeprefix("[").removesuffix("]").strip()
    is_list = len(inside) < len(text) - 1 and inside.startswith("{") and inside.endswith("}")
    return "a conversation written as text, not as a list of messages" if is_list and _ROLE_KEY.search(inside) else ""


def only_text(messages: list[Message]) -> str:
    """The text of a conversation's only turn beside the system's; "" where there are more."""
    texts = [m["content"].strip() for m in messages if m["role"] != "system"]
    return texts[0] if len(texts) == 1 else ""


class Apart(NamedTuple):
    """A conversation and its thoughts."""

    messages: list[Message]  # without any thought
    thoughts: list[str | None] | None  # of each turn; None where no turn has one


def apart(messages: list[Message]) -> Apart:
    """A conversation as everybody but the policy's chat template reads it, and the thoughts of its assistant's turns.

    A thought that stands in a content keeps its marks, so that `together` puts it there again.
    """
    kept: list[Message] = []
    thoughts: list[str | None] = []
    for message in messages:
        thought, content = message.get("reasoning_content"), message["content"]
        if thought is None and message["role"] == "assistant":
            thought, content = split_content(content)
        kept.append({"role": message["role"], "content": content})
        thoughts.append(thought or None)
    return Apart(kept, thoughts if any(thoughts) else None)


def together(messages: list[Message], thoughts: list[str | None] | None) -> list[Message]:
    """What `apart` took apart. Raises ValueError where `thoughts` are not one a turn."""
    if not thoughts:
        return messages
    if len(thoughts) != len(messages):
        raise ValueError(f"prompt_thoughts has {len(thoughts)} entries for a prompt of {len(messages)} turns")
    whole: list[Message] = []
    for message, thought in zip(messages, thoughts, strict=True):
        if thought and split_content(thought) == (thought, ""):
            message = {**message, "content": thought + message["content"]}
        elif thought:
            message = {**message, "reasoning_content": thought}
        whole.append(message)
    return whole


def split_content(content: str) -> tuple[str, str]:
    """(the thought at the beginning of an assistant's content, with its marks and the white space; the answer).

    The thought is "" where there is none. A content may begin within a thought, as a model writes it whose template has
    opened the thought in the prompt; but a mark in quotes, as in an answer about code, ends none.
    """
    for begin, end in THOUGHT_MARKS:
        before, mark, answer = content.partition(end)
        inside = before.lstrip().removeprefix(begin)
        is_quoted = inside == before.lstrip() and before.endswith(("'", '"', "`"))
        if mark and begin not in inside and not is_quoted:
            answer = answer.lstrip()
            return content[: len(content) - len(answer)], answer
    return "", content


def begins_a_thought(content: str) -> bool:
    """Whether an assistant's content begins with a thought that it does not end."""
    return any(content.lstrip().startswith(begin) and end not in content for begin, end in THOUGHT_MARKS)


def thought_in(marked: str) -> str:
    """A thought without its marks, as split_content gives it with them."""
    for begin, end in THOUGHT_MARKS:
        if marked.rstrip().endswith(end):
            return marked.rstrip().removesuffix(end).lstrip().removeprefix(begin).strip()
    return marked.strip()


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise ValueError("not text")
    more = [name for name in BEYOND_TEXT if turn.get(name)]  # None and [] are what pyarrow makes of other rows' fields
    if more:
        raise BeyondTextError(f"a message has {more[0]}, which this pipeline does not hand on")
    role, content = turn.get("role"), turn.get("content")
    if role is None and content is None:
        role, content = turn.get("from"), turn.get("value")
        role = _SHAREGPT.get(role, role) if isinstance(role, str) else role

    thoughts = {name: turn[name] for name in THOUGHT_FIELDS if turn.get(name)}
    if isinstance(content, list):
        thinking = [part for part in content if isinstance(part, dict) and part.get("type") == "thinking"]
        if thinking and content[: len(thinking)] == thinking:
            thoughts["thinking"] = "".join(_joined(part.get("thinking")) for part in thinking)
            content = content[len(thinking) :]
        content = _joined(content)
    if not (role and is_text(role) and is_text(content)):
        raise ValueError("not text")
    message = {"role": role, "content": content}
    if thoughts:
        message["reasoning_content"] = _only_thought(role, thoughts)
    return message


def _joined(content: Any) -> str:
    """A content in parts, which must all be text."""
    parts = content if isinstance(content, list) else [{"text": content}]
    if any(isinstance(part, dict) and (part.get("type") or "text") != "text" for part in parts):
        raise BeyondTextError("a message has parts that are not text")
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else None
        if not is_text(text):
            raise ValueError("a message has parts that are not text")
        texts.append(text)
    return "".join(texts)


def _only_thought(role: str, thoughts: dict[str, Any]) -> str:
    """The thought of an assistant's turn, which some tools write into two fields."""
    name, thought = next(iter(thoughts.items()))
    if role != "assistant" or not is_text(thought):
        raise BeyondTextError(f"a message has {name}, which this pipeline does not hand on")
    if any(other != thought for other in thoughts.values()):
        raise BeyondTextError(f"a message has different thoughts in {' and '.join(thoughts)}")
    return thought


def is_text(value: Any) -> TypeGuard[str]:
    """Whether `value` is a str that UTF-8 can hold. JSON can hold half a surrogate pair, which no file format takes."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False

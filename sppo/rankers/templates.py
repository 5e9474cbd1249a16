"""What a judge is asked, as a template with three fields: {conversation}, {first} and {second}.

A template comes from a file of the user's, or is one of the presets in sppo/rankers/judges. No text that is filled in
can close its own frame or speak as the chat format does, whatever the template.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from sppo.command.errors import UsageError
from sppo.recipe import nearest, read_yaml

FIELDS = {"conversation": "conversation", "first": "response_A", "second": "response_B"}  # and the tags around each
_PRESETS = Path(__file__).parent / "judges"

# The start of the usual chat formats' control tokens. A space is put behind it in every text: otherwise the server's
# tokenizer would take, say, <|im_end|> in a response for the end of the user's turn, and what follows for the answer.
_CONTROL = re.compile(r"<(?=[|｜]|/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn)>)|\[(?=/?(?:INST|SYSTEM_PROMPT)\])")


def presets() -> list[str]:
    """The names of the forms that come with the project."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """A preset's `template`, `verdict` and `max_tokens`; `first` where the first match is the verdict."""
    return read_yaml((_PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))


def load_template(name_or_file: str, flag: str) -> str:
    """The text of a template: a preset's of this name, else that of a file, without a newline at its end.

    Raises UsageError, which names the flag, for no such file, and for a field that is missing or not known.
    """
    if name_or_file in presets():
        return read_preset(name_or_file)["template"]
    return read_template(name_or_file, flag, presets())


def read_template(name_or_file: str, flag: str, known: list[str]) -> str:
    """As load_template, of a file. `known`: the names that could have been meant."""
    try:
        # utf-8-sig: some editors put a mark before the text, which no model has seen
        text = Path(name_or_file).expanduser().read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, ValueError) as error:
        told = f"as UTF-8 text: {error}" if isinstance(error, ValueError) else f"({error.strerror})"
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read {told}"
        hint = nearest(name_or_file, known)
        raise UsageError(f"{flag} {name_or_file}: {reason}; it is a file, or one of {', '.join(known)}{hint}") from None

    # a typo in a field would otherwise be shown to the judge as it stands, and a text would be missing
    if doubled := re.search(r"\{\{\s*(\w+)\s*\}\}", text):
        raise UsageError(f"{flag} {name_or_file}: {doubled[0]}: a field has one brace on each side: {{{doubled[1]}}}")
    named = re.findall(r"\{(\w+)\}", text)
    if unknown := [name for name in named if name not in FIELDS]:
        hint = nearest(unknown[0], FIELDS) or "."
        raise UsageError(
            f"{flag} {name_or_file}: unknown field {{{unknown[0]}}}{hint} There are {{{'}, {'.join(FIELDS)}}}; what is "
            f"to stay as it is has a space inside its braces: {{ {unknown[0]} }}"
        )
    if missing := [name for name in FIELDS if name not in named]:
        raise UsageError(
            f"{flag} {name_or_file}: no {{{missing[0]}}} in it; a template needs {{{'}, {'.join(FIELDS)}}}"
        )
    return text


def without_control(text: str) -> str:
    """A text that spells no control token of the usual chat formats."""
    return _CONTROL.sub(r"\g<0> ", text)


def fill(template: str, conversation: str, first: str, second: str) -> str:
    """The template with its texts, each between two tags with a code.

    No text holds the code of its own tags, which is a hash over it; control tokens of chat formats are broken.
    """
    texts = [without_control(text) for text in (conversation, first, second)]
    framed, code = {}, ""
    for (field, tag), text in zip(FIELDS.items(), texts, strict=True):
        code = hashlib.sha256(f"{code}{text}".encode()).hexdigest()[:12]  # pairs with the same start share a prefix
        framed[field] = f"<{tag} {code}>\n{text}\n</{tag} {code}>"
    # in one pass: a field's name in a text that is filled in stays as it is
    return re.sub(rf"\{{({'|'.join(FIELDS)})\}}", lambda field: framed[field[1]], template)

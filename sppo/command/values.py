"""What holds for the value of any flag and setting: `~` is the home directory, and no password or token is in it.

Recipes, logs and pages keep what a run was started with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sppo.command.errors import UsageError

# settings and flags that may be a path, or a name on the Hub
_PLACES = set("model prompts ranker eval_prompts anchor_model recipe base models mixture questions dataset "
              "accelerate_config run_dir data_dir model_dir judge_template".split())  # fmt: skip
# An address with a password in it; a token of the Hub; a key of OpenAI's kind. Such a key begins a word, and has
# capital letters, digits and a long piece without a hyphen: a model's name or a path may hold `sk-` too.
_SECRET = re.compile(
    r"://[^/\s?#:@]*:[^/\s?#]*@|\bhf_[A-Za-z0-9]{30,}"
    r"|(?<![\w./~-])sk-(?=[\w-]*[A-Z])(?=[\w-]*[0-9])(?=[\w-]*[A-Za-z0-9]{16})[\w-]{40,}(?![\w/.-])"
)
_INSTEAD = "set OPENAI_API_KEY or HF_TOKEN in the environment"


def expanded(name: str, value: Any) -> Any:
    """A setting's or flag's value with the home directory for `~`, which a shell leaves in `--run_dir=~/x`."""
    if isinstance(value, list):
        return [expanded(name, one) for one in value]
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))  # noqa: PTH111 - Path's own raises where there is no such user
    return os.path.expanduser(value) if name in _PLACES and isinstance(value, str) else value  # noqa: PTH111


def refuse_secrets(where: str, value: Any) -> None:
    """Raise UsageError, which does not repeat it, for a setting whose text holds a password or a token."""
    if _SECRET.search(str(value)):
        raise UsageError(f"{where} holds a password or a token, which recipes, logs and pages would show; {_INSTEAD}")


def refuse_secret_flags(words: Sequence[str]) -> None:
    """The same for each word of a command line. A value is named by its flag."""
    flag = "the command line"
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0]
        refuse_secrets("a flag" if _SECRET.search(flag) else flag, word)


def require_plain_address(flag: str, url: str) -> None:
    """Raise UsageError for a server's address that is none, or has more in it than where the server is."""
    if "@" in url or "?" in url or "#" in url:
        raise UsageError(
            f"{flag} is an address with a user, a `?` or a `#` in it, which may be a password or a key, and recipes, "
            "logs and pages would show it; set OPENAI_API_KEY in the environment, and leave these out"
        )
    if url and not _is_address(url):
        raise UsageError(f"{flag} {url!r} is no address of a server; one is written as http://localhost:8000/v1")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        return False
    return is_whole and not re.search(r"[\x00-\x20\x7f]", url)  # urlsplit takes a line break away

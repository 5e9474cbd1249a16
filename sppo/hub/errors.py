"""What an error of the Hub's client means, and what one can do: the same for a push and for the preflight."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

_LONGEST_WAIT = 300.0  # seconds, whatever Retry-After says


@dataclass(frozen=True)
class Trouble:
    """An error of the Hub's client, in words.

    `passes`: whether it may pass by itself: the network, or a server that is overloaded or broken.
    `wait`: for how many seconds the Hub asks to wait; 0 where it does not say.
    """

    text: str
    advice: str = ""
    passes: bool = False
    wait: float = 0.0

    def __str__(self) -> str:
        return f"{self.text}; {self.advice}" if self.advice else self.text


def explain(error: Exception) -> Trouble:
    """What an error means. Holds no token and no signed address."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, LocalTokenNotFoundError):
        return Trouble("there is no token", "set HF_TOKEN or run `hf auth login`")
    if isinstance(error, OfflineModeIsEnabled):
        return Trouble("HF_HUB_OFFLINE is set", "unset it, or push nothing")

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:  # an upload's own error is the cause of a RuntimeError
        causes.append(cause)
    refusal = next((e for e in causes if isinstance(e, HfHubHTTPError)), None)
    if refusal is not None:
        return _of_answer(
            refusal.response.status_code, refusal.response.headers.get("Retry-After", ""), _plain(refusal)
        )
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return Trouble(f"the Hub does not take it: {_plain(error)}")
    return Trouble(f"the Hub is out of reach: {_plain(causes[-1])}", "try again later", passes=True)


def _of_answer(status: int, retry_after: str, said: str) -> Trouble:
    """What an HTTP status that is no success means."""
    if status >= 500 or status in (408, 429):
        wait = min(_LONGEST_WAIT, float(retry_after)) if retry_after.isdigit() else 0.0
        return Trouble(f"the Hub does not answer now ({status}): {said}", "try again later", passes=True, wait=wait)
    if status in (401, 403, 404):
        advice = "check --org, and that the token (HF_TOKEN, or `hf auth login`) is valid and may write there"
        return Trouble(f"the Hub refuses ({status}): {said}", advice)
    return Trouble(f"the Hub refuses ({status}): {said}")


def _plain(error: BaseException) -> str:
    """An error in one line, without the token and without the secret parts of an address."""
    from huggingface_hub import get_token

    text = " ".join((getattr(error, "server_message", None) or str(error)).split())
    text = re.sub(r"(?<=://)[^/@\s]*@|(?<=\S)\?\S+", "", text).replace(get_token() or "\0", "***")
    return text[:300] or type(error).__name__

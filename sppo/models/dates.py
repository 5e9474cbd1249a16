"""The date that a chat template writes into prompts, where it asks transformers for today's by `strftime_now`.

A tokenizer knows its date, so whoever renders with it writes that one; today's only where none is fixed. A template
that takes the date as an argument of its own, such as Llama-3.1's date_string, is not touched by it.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLOCK = "strftime_now"  # what templates call, with a format as Python's strftime takes it


def today() -> str:
    """Today's date, YYYY-MM-DD."""
    return datetime.now().strftime("%Y-%m-%d")


def fix_date(tokenizer: PreTrainedTokenizerBase, date: str) -> None:
    """Let the template write this date (YYYY-MM-DD) wherever it asks for today's. Empty: today's, each time."""
    tokenizer.__dict__["_sppo_date"] = date


def asks_for_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template asks for today's date anywhere. See frames.writes_date for whether it writes it."""
    return CLOCK in str(tokenizer.chat_template)  # a dictionary where a model has several


def clock(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the template gets in the place of transformers' clock; {} where no date is fixed, or it asks for none."""
    date = tokenizer.__dict__.get("_sppo_date")
    return {CLOCK: datetime.fromisoformat(date).strftime} if date and asks_for_date(tokenizer) else {}

"""A judge behind an OpenAI-compatible chat endpoint as the preference model: logit = log P(first) - log P(second).

Each ordered pair is one question, so every two responses are shown both ways round. What is asked is a template, and
the verdict may stand behind the judge's reasoning (verdicts.py). P of a verdict is the mass of all its spellings
("A", " A", "**A") among the 20 likeliest tokens at its place; the judge is asked at temperature 0. With --judge_votes
it is asked several times at temperature 1 instead, and its verdicts are counted.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sppo.command.errors import SPPOError, UsageError
from sppo.command.stopping import time_limit
from sppo.rankers import TRIAL
from sppo.rankers.chat_server import ranker_server
from sppo.rankers.templates import fill, load_template, presets, read_preset
from sppo.rankers.verdicts import HARD, Verdict, read_choice, verdict_pattern, vote
from sppo.recipe import Recipe, is_second_judge
from sppo.schema import Message, Pair, prompt_text

if TYPE_CHECKING:
    from openai import OpenAI

TOP_LOGPROBS = 20
_ROOM = 1024  # tokens for the answer to a template of the user's
_SECONDS = 10  # of computing that the regex may take for the answers to one pair
_DEFAULT = "letter"  # the preset whose settings are left out of a ranking's identity


class Form(NamedTuple):
    """What a judge is asked, and how its answer is read. `first`: by the first match. `votes`: 0 where by log-probs."""

    template: str
    verdict: re.Pattern[str]
    first: bool
    max_tokens: int
    votes: int


def judge_form(recipe: Recipe) -> Form:
    """The form that the recipe's judge_... settings describe.

    Raises UsageError for a template or a regex that cannot be used, and for a template of the user's without a regex.
    """
    name = recipe.judge_template
    template = load_template(name, "--judge_template")
    preset = read_preset(name) if name in presets() else {"verdict": "", "max_tokens": _ROOM}
    regex = recipe.judge_verdict or preset["verdict"]
    if not regex:
        raise UsageError(
            f"--judge_template {name} needs --judge_verdict, which says where the verdict stands in an answer: "
            r"'\[\[([ABC])\]\]', say"
        )
    room = recipe.judge_max_tokens or preset["max_tokens"]
    first = regex == preset["verdict"] and preset.get("first", False)
    return Form(template, verdict_pattern(regex, "--judge_verdict"), first, room, recipe.judge_votes)


def judge_prompt(template: str, prompt: list[Message], first: str, second: str) -> str:
    """The judge's user turn."""
    return fill(template, prompt_text(prompt), first, second)


class JudgeRanker:
    """Asks the judge's server, `ranker_concurrency` requests at once."""

    batched = False

    def __init__(self, recipe: Recipe) -> None:
        if not recipe.ranker_url:
            raise UsageError("--ranker_backend judge needs --ranker_url, its server: http://localhost:8000/v1")
        self.server = ranker_server(recipe, "judge")
        self.recipe, self.form = recipe, judge_form(recipe)
        self.logprobs = True  # until the server refuses a request for the sake of them
        self.many = True  # until it refuses one for several answers

    def count_cut(self, prompt: list[Message], responses: Sequence[str]) -> int:
        """0: the judge gets all of the text, or refuses it."""
        return 0

    def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        """(index, logit) as answers come; NaN for what the judge refuses, or answers without a verdict.

        Raises SPPOError for what no further request would mend, and where a request failed once too often.
        """
        for index, choices in self.server.ask_all(pairs, self._choices):
            yield index, math.nan if choices is None else self._logit(choices)

    def _choices(self, client: OpenAI, pair: Pair) -> list[dict[str, Any]] | None:
        """The judge's answers to a pair; None where it is refused."""
        try:
            return self._sample(client, pair) if self.form.votes else self._ask(client, pair)
        except self.server.failures as error:
            self.server.set_aside(error, "a pair")
            return None

    def _logit(self, choices: list[dict[str, Any]]) -> float:
        """What the answers say of a pair. In the main thread, where the time of a user's regex is limited."""
        regex = self.form.verdict.pattern
        slow = (
            f"--judge_verdict {regex} has not read an answer within {_SECONDS} s: it has too many ways to match one. "
            "Take a repeat inside of a repeat out of it"
        )
        try:
            with time_limit(_SECONDS, slow):
                verdicts = [read_choice(choice, self.form.verdict, self.form.first) for choice in choices]
        except self.server.failures as error:
            raise self.server.failure(error) from None

        self._note_unread(verdicts, choices)
        if self.form.votes:
            return vote(verdicts)
        if any(verdict.is_hard for verdict in verdicts):
            self.server.note(f"the server gives no log-probs, so an answer counts as a logit of {HARD:g} or {-HARD:g}")
        return verdicts[0].logit if verdicts else math.nan

    def _note_unread(self, verdicts: list[Verdict], choices: list[dict[str, Any]]) -> None:
        """Say once why an answer counts for nothing, and what could be done."""
        left_out = "is no vote" if self.form.votes else "and its prompt is set aside"
        unread = [i for i, verdict in enumerate(verdicts) if math.isnan(verdict.logit)]
        if any(verdicts[i].is_cut for i in unread):
            more = f": raise --judge_max_tokens {self.form.max_tokens}, if this is frequent"
            more = "" if is_second_judge(self.recipe) else more
            self.server.note(f"an answer was cut off before its verdict, {left_out}{more}")
        elif unread or not verdicts:
            said = choices[unread[0]].get("message") if unread else None
            end = str((said or {}).get("content") or "")[-80:]
            told = f"an answer without a verdict, or with invalid log-probs, {left_out}"
            if unread and (word := verdicts[unread[0]].unknown):
                told = f"the regex finds {word!r}, which is neither A, B, 1, 2, first, second nor a tie, {left_out}"
            self.server.note(f"{told}: it ends in {end!r}" if end else told)

    def _request(self, pair: Pair) -> dict[str, Any]:
        content = judge_prompt(self.form.template, *pair)
        messages = [{"role": "user", "content": content}]
        request = {"model": self.recipe.ranker, "messages": messages, "max_tokens": self.form.max_tokens}
        if self.recipe.chat_template_kwargs:  # {"enable_thinking": false} for a judge that would think aloud
            request["extra_body"] = {"chat_template_kwargs": self.recipe.chat_template_kwargs}
        return request

    def _ask(self, client: OpenAI, pair: Pair) -> list[dict[str, Any]]:
        """The judge's one answer, with log-probs where the server has them."""
        request = {**self._request(pair), "temperature": 0}
        if self.logprobs:
            asked = {**request, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
            try:
                return self.server.complete(client, asked)["choices"][:1]
            except self.server.openai.BadRequestError as error:
                if "logprobs" not in error.message:
                    raise
                self.server.note(f"asking without log-probs, which the server refuses: {self.server.words(error)}")
                self.logprobs = False
        return self.server.complete(client, request)["choices"][:1]

    def _sample(self, client: OpenAI, pair: Pair) -> list[dict[str, Any]]:
        """`judge_votes` answers. Several come from one request, where the server gives several."""
        choices: list[dict[str, Any]] = []
        request = {**self._request(pair), "temperature": 1}
        many = self.many
        while (left := self.form.votes - len(choices)) > 0:
            asked = {**request, "n": left} if many and left > 1 else request
            try:
                made = self.server.complete(client, asked)["choices"]
            except self.server.openai.BadRequestError:
                if "n" not in asked:
                    raise
                many = False  # for the number of answers, or for the text: asking for one shows which
                continue
            if not made:
                break
            choices += made[:left]
            self.many = many
        return choices


def fetch(recipe: Recipe) -> str:
    """The server's address, once it serves the judge and the judge has answered a trial question with a verdict."""
    judge = JudgeRanker(recipe)
    judge.server.check_serves(recipe.ranker)
    if not all(math.isfinite(logit) for _, logit in judge.logits([TRIAL])):
        more = "" if is_second_judge(recipe) else ", or a --judge_template for judges that reason"
        raise SPPOError(
            f"the judge {recipe.ranker} answers a trial question without a verdict (the line above says more); one "
            f"""that thinks aloud wants --chat_template_kwargs '{{"enable_thinking": false}}'{more}"""
        )
    return recipe.ranker_url


def identity(recipe: Recipe) -> dict[str, Any]:
    """The judge's name, what it is told and how it is read. Not the address: the same judge may be served anywhere.

    What is read as the project's own form is, is left out, as it was before there were others.
    """
    form = judge_form(recipe)
    told = judge_prompt(form.template, [{"role": "user", "content": "prompt"}], "first", "second")
    template, kwargs = hashlib.sha256(told.encode()).hexdigest()[:16], recipe.chat_template_kwargs
    asked = {"backend": "judge", "ranker": recipe.ranker, "template": template, "chat_template_kwargs": kwargs}
    usual = {**read_preset(_DEFAULT), "votes": 0}
    read = {"verdict": form.verdict.pattern, "max_tokens": form.max_tokens, "votes": form.votes}
    return asked | {key: value for key, value in read.items() if value != usual[key]}


def load(recipe: Recipe) -> JudgeRanker:
    """The judge, ready to be asked."""
    return JudgeRanker(recipe)

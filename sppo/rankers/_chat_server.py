"""An OpenAI-compatible chat server, asked many questions at once: what is tried again, and what its errors mean."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin, urlsplit

from sppo.command.errors import SPPOError
from sppo.command.importing import is_installed
from sppo.command.values import require_plain_address

if TYPE_CHECKING:
    from openai import APIError, AsyncOpenAI

Item, Answer = TypeVar("Item"), TypeVar("Answer")

_GRACE = 5  # seconds for the answers that are under way when one fails
TOO_MUCH = (400, 413, 422)  # this request is not taken: too long for the model, or filtered


def is_logprob(value: Any) -> bool:
    """Whether a server's number can be the log of a probability: not NaN, not infinite, not above 0 but by rounding."""
    return isinstance(value, (int, float)) and math.isfinite(value) and value < 0.01


@dataclass
class ChatServer:
    """The server at `url`, which gets `concurrency` requests at once. The key is OPENAI_API_KEY in the environment.

    `url_flag` and `model_flag` are what messages tell the user to look at.
    """

    url: str
    url_flag: str
    model_flag: str
    concurrency: int = 32
    timeout: float = 120  # seconds
    retries: int = 5
    noted: set[str] = field(default_factory=set)
    newer_limit: bool = False  # the server has refused max_tokens and wants max_completion_tokens

    def __post_init__(self) -> None:
        require_plain_address(self.url_flag, self.url)
        if not is_installed("openai"):
            raise SPPOError("asking a chat server needs a package: pip install 'openai>=2.25'")
        import openai

        self.openai = openai
        # all but the first: the server has answered with something that is no chat completion
        self.failures = (openai.APIError, AttributeError, KeyError, TypeError, ValueError)
        self.key = os.environ.get("OPENAI_API_KEY", "")

    def client(self) -> AsyncOpenAI:
        """A client of this event loop, which itself retries 408, 409, 429, 5xx, no connection, no answer in time.

        It follows no redirect: prompts and key go to the address that the user has named, and nowhere else.
        """
        there = self.openai.DefaultAsyncHttpxClient(follow_redirects=False)
        how = {"timeout": self.timeout, "max_retries": self.retries, "http_client": there}
        return self.openai.AsyncOpenAI(base_url=self.url, api_key=self.key or "none", **how)

    def ask_all(
        self, items: Iterable[Item], ask: Callable[[AsyncOpenAI, Item], Awaitable[Answer]]
    ) -> Iterator[tuple[int, Answer]]:
        """(index, what `ask` gives of the item), as answers come.

        Raises what `ask` raises, once those under way have had some seconds: their answers are paid for. At a Ctrl-C
        they are dropped.
        """
        loop, failed = asyncio.new_event_loop(), None
        client, waiting, running = self.client(), iter(enumerate(items)), set()

        async def answer(index: int, item: Item) -> tuple[int, Answer]:
            return index, await ask(client, item)

        try:
            while True:
                for index, item in islice(waiting, 0 if failed else self.concurrency - len(running)):
                    running.add(loop.create_task(answer(index, item)))
                if not running:
                    break
                grace = _GRACE if failed else None
                some = asyncio.wait(running, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
                done, running = loop.run_until_complete(some)
                if not done:
                    break
                for task in done:
                    failed = failed or task.exception()
                    if not task.exception():
                        yield task.result()
            if failed:
                raise failed
        finally:
            for task in running:
                if task.done() and not task.cancelled():
                    task.exception()  # a Ctrl-C that came while it was at work: read, so that asyncio does not print it
            loop.run_until_complete(_drop(asyncio.all_tasks(loop), client))
            loop.close()

    async def complete(self, client: AsyncOpenAI, request: dict[str, Any]) -> dict[str, Any]:
        """The chat completion of a request, as JSON.

        Raises SPPOError where the server does not take the temperature: every judgement would be another one then.
        """
        if self.newer_limit and "max_tokens" in request:
            rest = {key: value for key, value in request.items() if key != "max_tokens"}
            request = {**rest, "max_completion_tokens": request["max_tokens"]}
        try:
            return json.loads((await client.chat.completions.with_raw_response.create(**request)).text)
        except self.openai.BadRequestError as error:
            if "max_tokens" in request and "max_completion_tokens" in error.message:
                self.note("asking with max_completion_tokens, as the server wants it, for max_tokens")
                self.newer_limit = True
                return await self.complete(client, request)
            if "temperature" in request and re.search("temperature.*support", error.message):
                told = f"does not take temperature {request['temperature']:g}: {self.words(error)}"
                raise SPPOError(f"the judge at {self.url} {told}. Take another judge as {self.model_flag}") from None
            raise

    def models(self) -> list[str]:
        """The names that the server gives its models. Raises SPPOError."""

        async def listed() -> list[str]:
            async with self.client() as client:
                return [model.id async for model in client.models.list()]

        try:
            return asyncio.run(listed())
        except self.failures as error:
            raise self.failure(error) from None

    def check_serves(self, model: str) -> None:
        """Raises SPPOError where the server gives no answer, or has no such model."""
        served = self.models()
        if model not in served:
            raise SPPOError(f"{self.url} serves {', '.join(served) or 'no model'}, not {self.model_flag} {model}")

    def failure(self, error: Exception) -> SPPOError:
        """What a failed request means for the user."""
        status, where = getattr(error, "status_code", None), f"the judge at {self.url}"
        if not isinstance(error, self.openai.APIError):
            return SPPOError(f"{where} is no OpenAI-compatible server; {self.url_flag} usually ends in /v1")
        if status and 300 <= status < 400:
            return SPPOError(
                f"{where} answers HTTP {status} and points to {self._points_to(error)}; prompts are sent to no other "
                f"address by themselves. If that is the judge, pass it as {self.url_flag}"
            )
        if status in (401, 403):
            return SPPOError(f"{where} answers HTTP {status}; check OPENAI_API_KEY in the environment")
        if status == 404:
            return SPPOError(
                f"{where} answers HTTP 404; check {self.model_flag}, and {self.url_flag}, which usually ends in /v1"
            )
        if status and status < 500 and status not in (408, 409, 429):
            return SPPOError(f"{where} does not take the request: {self.words(error)}")
        return SPPOError(
            f"{where} gives no answer, asked {self.retries + 1} times ({self.words(error)}); "
            "see to the server and run the same command to go on"
        )

    def _points_to(self, error: APIError) -> str:
        """Where a redirect leads, without what may be secret in it."""
        aim = urlsplit(urljoin(self.url, error.response.headers.get("location", "")))
        return f"{aim.scheme}://{aim.netloc.rpartition('@')[2]}{aim.path}"

    def words(self, error: APIError) -> str:
        """The error in a line, without the key, should the server repeat it."""
        text = " ".join(error.message.split())
        return (text.replace(self.key, "***") if self.key else text)[:300]

    def note(self, text: str) -> None:
        """Say once what holds for one answer and maybe for all."""
        if text.split(":")[0] not in self.noted:
            self.noted.add(text.split(":")[0])
            print(f"judge: {text}", file=sys.stderr, flush=True)


async def _drop(tasks: set[asyncio.Task[Any]], client: AsyncOpenAI) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()

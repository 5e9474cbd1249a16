"""An OpenAI-compatible server, asked many questions at once: what is tried again, and what its errors mean."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from sppo.command.errors import SPPOError, first_line
from sppo.command.importing import is_installed
from sppo.command.values import require_plain_address
from sppo.recipe import Recipe, is_second_judge

if TYPE_CHECKING:
    from openai import APIError, APIStatusError, OpenAI
    from openai.types import Model

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_GRACE = 5  # seconds to wait for each further answer once a question has failed
TOO_MUCH = (400, 413, 422)  # statuses of a request that is refused for what it holds: too long, or filtered


def is_logprob(value: Any) -> bool:
    """Whether a server's number can be the log of a probability: not NaN, not infinite, not above 0 but by rounding."""
    return isinstance(value, (int, float)) and math.isfinite(value) and value < 0.01


@dataclass
class ChatServer:
    """The server at `url`, which gets `concurrency` requests at once. The key is OPENAI_API_KEY in the environment.

    `url_flag` and `model_flag` are what messages tell the user to look at; `what` is what they call the server.
    Raises SPPOError, or UsageError for the address, where no server could be asked in this way.
    """

    url: str
    url_flag: str
    model_flag: str
    what: str = "judge"
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

        self._lock = threading.Lock()
        self.openai = openai
        # all but the first: the server has answered with something that is no chat completion
        broken = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError)
        self.failures = (openai.APIError, *broken)
        self.key = os.environ.get("OPENAI_API_KEY", "")
        if not re.fullmatch("[!-~]*", self.key):
            raise SPPOError(
                "OPENAI_API_KEY in the environment has a character that no key has, such as a space, a line break or a "
                "letter beyond ASCII; set it anew"
            )

    def client(self) -> OpenAI:
        """A client for any number of threads. It retries 408, 409, 429, 5xx, a lost connection and a timeout itself.

        It follows no redirect: prompts and key go to the address that the user has named, and nowhere else.
        Raises SPPOError where the environment's own settings of the network do not let one be made.
        """
        try:
            through = self.openai.DefaultHttpxClient(follow_redirects=False)
        except (ImportError, OSError, ValueError) as error:
            said = re.sub(r"://[^/\s']*@", "://***@", first_line(error))
            raise SPPOError(
                f"the {self.what} at {self.url} cannot be asked: see to HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and "
                f"SSL_CERT_FILE in the environment ({said})"
            ) from None
        return self.openai.OpenAI(
            base_url=self.url,
            api_key=self.key or "none",
            timeout=self.timeout,
            max_retries=self.retries,
            http_client=through,
        )

    def ask_all(self, items: Iterable[Item], ask: Callable[[OpenAI, Item], Answer]) -> Iterator[tuple[int, Answer]]:
        """(index of the item, what `ask` returns for it), in the order in which the answers come.

        Where `ask` raises, nothing more is sent. The requests under way are paid for, so their answers are waited for a
        few seconds; then the error is raised. A Ctrl-C, or a caller that wants no more, does not wait.
        """
        waiting = iter(enumerate(items))
        running: dict[Future[Answer], int] = {}  # the index of each item that is asked about
        failure: BaseException | None = None
        client, pool = self.client(), ThreadPoolExecutor(self.concurrency)
        try:
            while True:
                # as many requests as the server may get at once
                free = 0 if failure else self.concurrency - len(running)
                for index, item in islice(waiting, free):
                    running[pool.submit(ask, client, item)] = index

                if not running:
                    break
                done, _ = wait(running, timeout=_GRACE if failure else None, return_when=FIRST_COMPLETED)
                if not done:
                    break
                for future in done:
                    index = running.pop(future)
                    if error := future.exception():
                        failure = failure or error
                    else:
                        yield index, future.result()
            if failure:
                raise failure
        finally:
            # a thread that still waits for its answer ends with it, or with the process
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()

    def complete(self, client: OpenAI, request: dict[str, Any]) -> dict[str, Any]:
        """The chat completion of a request, as JSON.

        Raises SPPOError where the server does not take the temperature: every judgement would be another one then.
        """
        if self.newer_limit and "max_tokens" in request:
            rest = {key: value for key, value in request.items() if key != "max_tokens"}
            request = {**rest, "max_completion_tokens": request["max_tokens"]}
        try:
            return json.loads(client.chat.completions.with_raw_response.create(**request).text)
        except self.openai.BadRequestError as error:
            if "max_tokens" in request and "max_completion_tokens" in error.message:
                self.note("asking with max_completion_tokens, as the server wants it, for max_tokens")
                self.newer_limit = True
                return self.complete(client, request)
            if "temperature" in request and re.search("temperature.*support", error.message):
                told = f"does not take temperature {request['temperature']:g}: {self.words(error)}"
                raise SPPOError(f"the judge at {self.url} {told}. Take another judge as {self.model_flag}") from None
            raise

    def post(self, client: OpenAI, path: str, body: dict[str, Any]) -> Any:
        """The JSON that the server answers at a path beside its /v1; a text where it is no JSON."""
        root = self.url.rstrip("/").removesuffix("/v1")
        return client.post(root + path, body=body, cast_to=object)

    def served(self) -> list[Model]:
        """The models that the server lists. Raises SPPOError where it gives no answer."""
        try:
            with self.client() as client:
                return [model for model in client.models.list() if model.id and model.id.strip()]
        except self.failures as error:
            raise self.failure(error) from None

    def check_serves(self, model: str) -> None:
        """Raises SPPOError where the server gives no answer, or has no such model."""
        served = [listed.id for listed in self.served()]
        if model not in served:
            raise SPPOError(f"{self.url} serves {', '.join(served) or 'no model'}, not {self.model_flag} {model}")

    def set_aside(self, error: Exception, what: str) -> None:
        """Note that a request was refused for what it holds. Raises SPPOError for every other failure."""
        if not isinstance(error, self.openai.APIStatusError) or error.status_code not in TOO_MUCH:
            raise self.failure(error) from None
        self.note(f"{what} was refused and its prompt is set aside: {self.words(error)}")

    def failure(self, error: Exception) -> SPPOError:
        """What a failed request means for the user."""
        status, where = getattr(error, "status_code", None), f"the {self.what} at {self.url}{self._proxied()}"
        if not isinstance(error, self.openai.APIError):
            return SPPOError(f"{where} is no OpenAI-compatible server; {self.url_flag} usually ends in /v1")
        if isinstance(error, self.openai.APIStatusError) and 300 <= error.status_code < 400:
            return SPPOError(
                f"{where} answers HTTP {status} and points to {self._points_to(error)}; prompts are sent to no other "
                f"address by themselves. If that is the {self.what}, pass it as {self.url_flag}"
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

    def _proxied(self) -> str:
        """That the environment sends the requests through a proxy, whose words may not be the server's. Not which."""
        address = urlsplit(self.url)
        proxies = getproxies()
        name = next((name for name in (address.scheme, "all") if proxies.get(name)), "")
        host = address.hostname or ""
        if not name or proxy_bypass(host):
            return ""
        return f" (asked through {name.upper()}_PROXY; NO_PROXY={host} in the environment goes past it)"

    def _points_to(self, error: APIStatusError) -> str:
        """Where a redirect leads, without what may be secret in it."""
        aim = urlsplit(urljoin(self.url, error.response.headers.get("location", "")))
        return f"{aim.scheme}://{aim.netloc.rpartition('@')[2]}{aim.path}"

    def words(self, error: APIError) -> str:
        """The error in a line, and what the network said, without the key, should the server repeat it."""
        text = " ".join(f"{error.message} {error.__cause__ or ''}".split())
        return (text.replace(self.key, "***") if self.key else text)[:300]

    def note(self, text: str) -> None:
        """Say once what holds for one answer and maybe for all."""
        kind = text.split(":")[0]
        with self._lock:
            if kind not in self.noted:
                self.noted.add(kind)
                print(f"{self.what}: {text}", file=sys.stderr, flush=True)


def ranker_server(recipe: Recipe, what: str) -> ChatServer:
    """The server of the recipe's ranker. Messages name the flag that has named it: a second judge is all --judge."""
    is_second = is_second_judge(recipe)
    return ChatServer(
        recipe.ranker_url,
        url_flag="the address in --judge" if is_second else "--ranker_url",
        model_flag="--judge" if is_second else "--ranker",
        what=what,
        concurrency=recipe.ranker_concurrency,
        timeout=recipe.ranker_timeout,
        retries=recipe.ranker_retries,
    )

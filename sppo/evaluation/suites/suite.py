"""What the suites share: what was asked for, the answers, the judge, reading questions, and writing figures.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.command.errors import OtherWorkError, SPPOError, first_line
from sppo.command.progress import progress
from sppo.command.stopping import end_if_asked
from sppo.evaluation.answers import draw
from sppo.models.files import public_name
from sppo.rankers.chat_server import TOO_MUCH, ChatServer
from sppo.recipe import Recipe
from sppo.schema import Message, has_answer
from sppo.store.files import atomic, digest, write_json
from sppo.store.journal import Journal, refuse_another
from sppo.store.manifest import Stage
from sppo.store.parquet import open_parquet, read_rows
from sppo.store.shards import begun_shards

if TYPE_CHECKING:
    from openai import OpenAI

Figures = dict[str, float]
_OTHER_JUDGE = (
    "These judgements are kept. Finish with that --judge_model, use another --output_dir to keep both, or --overwrite "
    "to drop them."
)


@dataclass
class Order:
    """What evaluate.sh was asked for."""

    suite: str
    recipe: Recipe
    out: Path  # <output_dir>/suites/<suite>
    questions: str = ""  # a file of one's own; empty: the suite's questions
    judge_url: str = ""
    judge_model: str = ""  # empty where the suite has no judge
    overwrite: bool = False
    leaderboard: int = 1  # of Open LLM
    mixture: tuple[str, ...] = ()  # more models: for each question, one of all models is drawn to answer it

    @property
    def name(self) -> str:
        """The model's name in the suite's files: of runs/x/iter3/model it is x-iter3; of a mixture all names."""
        return "+".join(map(_name, (self.recipe.model, *self.mixture)))

    @property
    def recipes(self) -> list[Recipe]:
        """A recipe for each model that answers. --model_revision is the first model's."""
        others = [dataclasses.replace(self.recipe, model=model, model_revision="") for model in self.mixture]
        return [self.recipe, *others]

    def answered_by(self, question: str) -> int:
        """Which of `recipes` answers a question: the seed draws one, each as likely."""
        return random.Random(f"{self.recipe.seed} {question}").randrange(1 + len(self.mixture))


def _name(model: str) -> str:
    here = Path(model)
    return f"{here.parts[-3]}-{here.parts[-2]}" if is_iteration(here) else public_name(model)


def is_iteration(model: Path) -> bool:
    """Whether a model is one of a run: <run>/iter<i>/model."""
    parts = model.parts[-3:]
    return len(parts) == 3 and parts[2] == "model" and parts[1][:4] == "iter" and parts[1][4:].isdecimal()


def behind_link(model: str) -> str:
    """The model of a run that a link leads to, such as a guarded run's `best`; any other model as it is named."""
    link = Path(model)
    if link.is_symlink() and is_iteration(target := link.parent / os.readlink(link)):
        return str(target)
    return model


def draw_answers(order: Order, conversations: dict[str, list[Message]], name: str, **settings: Any) -> dict[str, str]:
    """The text of each response of draw_responses."""
    return {key: found["text"] for key, found in draw_responses(order, conversations, name, **settings).items()}


def draw_responses(
    order: Order, conversations: dict[str, list[Message]], name: str, **settings: Any
) -> dict[str, dict[str, Any]]:
    """The model's response (text, finish_reason) to each conversation, by its id; both are "" where there is none.

    They are drawn into <out>/answers/<name>. Each model of a mixture answers its share, in a directory of its own.
    `settings` replace the recipe's. Responses that are there already are kept.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, recipe in enumerate(order.recipes):
        asked = {key: value for key, value in conversations.items() if order.answered_by(key) == number}
        if asked:
            place = f"{name}/{number}" if order.mixture else name
            found |= _drawn(order, recipe, asked, place, **settings)
    if missing := len(conversations) - len(found):
        print(f"evaluate: {missing} questions are too long for the model; their answers count as empty")
    return {key: found.get(key, {"text": "", "finish_reason": ""}) for key in conversations}


def _drawn(
    order: Order, recipe: Recipe, conversations: dict[str, list[Message]], name: str, **settings: Any
) -> dict[str, dict[str, Any]]:
    """One model's responses, by id, to the conversations that are not too long for it."""
    out = order.out / "answers" / name
    prompts = out / "prompts.jsonl"
    lines = [json.dumps({"prompt_id": key, "prompt": value}) + "\n" for key, value in conversations.items()]
    if not prompts.exists() or prompts.read_text(encoding="utf-8") != "".join(lines):
        if begun_shards(out / "responses") and not order.overwrite:
            raise OtherWorkError(f"{out} holds answers to other questions.")
        with atomic(prompts) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    questions = {"prompts": str(prompts), "prompts_revision": "", "prompts_part": "0/1", "prompt_column": "prompt"}
    recipe = dataclasses.replace(recipe, **questions, pairs=1, **settings)
    drawn = draw(recipe, out, order.out / "logs", name.replace("/", "-"), order.overwrite)
    found = {row["prompt_id"]: row["responses"][0] for row in read_rows(drawn, ["prompt_id", "responses"])}
    if unfinished := sum(not has_answer(response) for response in found.values()):
        print(f"evaluate: the thoughts on {unfinished} questions did not end; their answers count as empty")
    return found


def text_of(choice: dict[str, Any]) -> str:
    """What the judge wrote."""
    return (choice.get("message") or {}).get("content") or ""


class SuiteJudge:
    """The judge of a suite. A journal keeps every judgement as soon as it arrives, so that none is paid for twice."""

    def __init__(self, order: Order) -> None:
        self.model = order.judge_model
        self.server = ChatServer(order.judge_url, "--judge_url", "--judge_model", concurrency=8, timeout=300)
        self._path, self._overwrite = order.out / "judgements.journal", order.overwrite
        self._identity = {"suite": order.suite, "judge": order.judge_model}

    def refuse_another(self) -> None:
        """Raise SPPOError where another judge's judgements are here, unless --overwrite drops them."""
        if not self._overwrite:
            refuse_another(self._path, self._identity, _OTHER_JUDGE)

    def choices(
        self, requests: Sequence[dict[str, Any]], is_answer: Callable[[dict[str, Any]], bool], wanted: str
    ) -> list[dict[str, Any]]:
        """The first choice of each request's completion, {} where the server refuses it.

        Raises SPPOError where the server fails, and where none of the first three is an answer (`wanted` says of what
        kind): the rest need not be paid for then. What is no answer is not kept, and asked again the next time.
        """
        keys = [hashlib.sha256(json.dumps(r, sort_keys=True).encode()).hexdigest() for r in requests]
        journal = Journal(self._path, self._identity, self._overwrite, _OTHER_JUDGE)
        found = {key: journal.read(key) for key in dict.fromkeys(keys) if key in journal.done}
        left = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
        first = 0 if found else 3
        try:
            with progress(len(set(keys)), "judge", "answer", len(found)) as bar:
                for some in filter(None, (list(left)[:first], list(left)[first:])):
                    for index, choice in self.server.ask_all([left[key] for key in some], self._ask):
                        found[some[index]] = choice
                        if is_answer(choice):
                            journal.add(some[index], choice)
                        bar.update()
                        end_if_asked()
                    if not journal.done:
                        raise self._no_answer(found[some[0]], wanted)
        finally:
            journal.close()
        return [found[key] for key in keys]

    def _ask(self, client: OpenAI, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return dict(self.server.complete(client, {"model": self.model, **request})["choices"][0])
        except (*self.server.failures, IndexError) as error:
            if not isinstance(error, self.server.openai.APIStatusError) or error.status_code not in TOO_MUCH:
                raise self.server.failure(error) from None
            self.server.note(f"a question was refused and is left out: {self.server.words(error)}")
            return {}

    def _no_answer(self, choice: dict[str, Any], wanted: str) -> SPPOError:
        said = text_of(choice) if choice else "an error, see above"
        return SPPOError(f"the judge {self.model} answers no question with {wanted}, but: {said[:200]!r}")

    def forget(self) -> None:
        """Remove the journal: the suite's own files hold all that was in it."""
        self._path.unlink(missing_ok=True)


def hub_files(repo: str, kind: str, names: list[str]) -> list[Path]:
    """Files of a repository of the Hub, from its cache, else the network: what was fetched asks no host again.

    Raises SPPOError that says how to fetch them.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def get(name: str) -> Path:
        try:
            return Path(hf_hub_download(repo, name, repo_type=kind, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(repo, name, repo_type=kind))

    try:
        return list(map(get, names))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SPPOError(
            f"the {kind} {repo} is not here, and the Hub does not give it ({first_line(error)}). Where there is a "
            f"network: hf download {repo} {' '.join(names)} --repo-type {kind}; then copy HF_HOME. Or pass --questions."
        ) from None


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The rows of a questions file: a JSON list, JSONL, or Parquet. Raises SPPOError for any other."""
    if not path.is_file():
        raise SPPOError(f"--questions {path}: no such file")
    if path.suffix == ".parquet":
        return list(read_rows(path, open_parquet(path, []).schema_arrow.names))
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise SPPOError(f"--questions {path}: not JSON ({error})") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise SPPOError(f"--questions {path}: it holds no questions, an object each")
    return rows


def figures_stage(order: Order, inputs: dict[str, Any], settings: dict[str, Any], files: Sequence[str] = ()) -> Stage:
    """The stage that makes <out>/figures.json, and the suite's own `files` beside it."""
    return Stage(
        order.suite,
        order.out / "figures.manifest.json",
        [order.out / name for name in ("figures.json", *files)],
        {"questions": order.questions and digest(Path(order.questions)), **inputs},
        {"judge": order.judge_model, **settings},
    )


def finish(order: Order, stage: Stage, figures: Figures, questions: int, **more: dict[str, Figures]) -> None:
    """Write figures.json, of which the report and summary.json show `figures`, and the manifest.

    more: tables of further figures.
    """
    made = {
        "suite": order.suite,
        "model": order.name,
        "judge": order.judge_model or None,
        "questions": Path(order.questions).name or None,
        "figures": _rounded(figures),
        **{name: {row: _rounded(of) for row, of in table.items()} for name, table in more.items()},
    }
    write_json(stage.outputs[0], made)
    stage.finish({"questions": questions}, judge=order.judge_model)


def _rounded(figures: Figures) -> Figures:
    return {k: v if isinstance(v, int) else round(v, 4) for k, v in figures.items()}

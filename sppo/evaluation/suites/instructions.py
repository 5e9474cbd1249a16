"""What IFEval and IFBench share: prompts with instructions that a program checks, and the shares that are followed.

Strictly, an answer must follow an instruction as it stands. Loosely, it may do so without its first line, its last line
or its asterisks, so that "Sure, here it is:" in front does not count. The benchmarks' own code decides both.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sppo.command.errors import FOREIGN, SPPOError, first_line
from sppo.evaluation.suites.suite import Figures, Order, draw_responses, figures_stage, finish, read_questions
from sppo.schema import content_id, has_answer
from sppo.store.files import atomic
from sppo.store.manifest import version_of

CHECKED = "checked.jsonl"  # every answer, and which instructions it follows

# (prompt, kind of instruction, its settings, answer, loosely) -> whether the answer follows it
Follows = Callable[[str, str, dict[str, Any], str, bool], bool]


class Followed(NamedTuple):
    """Which of a prompt's instructions one answer follows."""

    strict: list[bool]
    loose: list[bool]
    failed: int  # checks that ended in an error; they count as not followed


class Share(NamedTuple):
    percent: float
    standard_error: float | None  # None: of one prompt there is none


def read_prompts(order: Order, path: Path, known: dict[str, Any], is_given: Callable[[Any], bool]) -> list[Any]:
    """The prompts of a file: {key, prompt, instruction_id_list, kwargs}, kwargs without what is not given.

    known: the benchmark's class for each kind of instruction. Raises SPPOError for a row that it cannot check.
    """
    where = f"--questions {order.questions}" if order.questions else str(path)
    rows = []
    for number, row in enumerate(read_questions(path), 1):
        about = f"{where}, prompt {row.get('key', number)}"
        kinds, settings = row.get("instruction_id_list"), row.get("kwargs")
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise SPPOError(f"{about}: no prompt in it")
        if not isinstance(kinds, list) or not isinstance(settings, list) or not 0 < len(kinds) == len(settings):
            raise SPPOError(f"{about}: instruction_id_list and kwargs must be lists, and as long as each other")
        given = []
        for kind, values in zip(kinds, settings, strict=True):
            if not isinstance(kind, str) or not isinstance(values, dict):
                raise SPPOError(f"{about}: instruction_id_list must hold texts, and kwargs objects")
            given.append({k: v for k, v in values.items() if is_given(v)})
            _refuse_unchecked(about, kind, given[-1], known)
        rows.append({"key": row.get("key", number), "prompt": row["prompt"], "instruction_id_list": kinds,
                     "kwargs": given})  # fmt: skip
    return rows


def _refuse_unchecked(about: str, kind: str, given: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise SPPOError for an instruction that is unknown, or whose settings do not fit.

    What is not given the benchmarks would draw at random, and check something that the prompt does not ask for.
    """
    if kind not in known:
        raise SPPOError(f"{about}: {kind} is no kind of instruction that --suite knows")
    checker = known[kind](kind)
    needs = checker.get_instruction_args_keys()
    if set(given) != set(needs):
        raise SPPOError(f"{about}: {kind} needs {', '.join(needs) or 'nothing'} in kwargs, not {given}")
    try:
        checker.build_description(**given)
    except FOREIGN as error:
        raise SPPOError(f"{about}: {kind} does not take {given} ({first_line(error)})") from None


def run_checks(order: Order, rows: list[dict[str, Any]], follows: Follows, package: str) -> None:
    """Answer greedily, check, and write figures.json and checked.jsonl. `package`: which holds the checks."""
    asked = {f"{n:04d}": [{"role": "user", "content": row["prompt"]}] for n, row in enumerate(rows)}
    responses = list(draw_responses(order, asked, order.suite, temperature=0.0, top_p=1.0).values())
    answers = [response["text"] for response in responses]
    inputs = {"prompts": content_id(rows), "answers": content_id(answers)}
    stage = figures_stage(order, inputs, {"checks": f"{package} {version_of(package)}"}, (CHECKED,))
    if not stage.make_ready(order.overwrite):
        return
    stage.begin()

    checked = [check(row, answer, follows) for row, answer in zip(rows, answers, strict=True)]
    with atomic(order.out / CHECKED) as temporary:
        lines = [
            json.dumps({**row, "answer": answer, "strict": one.strict, "loose": one.loose}, ensure_ascii=False) + "\n"
            for row, answer, one in zip(rows, answers, checked, strict=True)
        ]
        temporary.write_text("".join(lines), encoding="utf-8")

    figures = figures_of(checked)
    figures["cut_at_maxlen"] = sum(response["finish_reason"] == "length" for response in responses)
    if unfinished := sum(not has_answer(response) for response in responses):
        figures["unfinished_thoughts"] = unfinished
    if failed := sum(one.failed for one in checked):
        figures["checks_failed"] = failed
        print(f"{order.suite}: {failed} checks ended in an error of {package}; they count as not followed")
    finish(order, stage, figures, len(rows), kinds=kinds_of([row["instruction_id_list"] for row in rows], checked))


def check(row: dict[str, Any], answer: str, follows: Follows) -> Followed:
    """Which instructions of a prompt an answer follows. Each is checked by itself, so that an error hits it alone."""
    failed = 0
    found: dict[bool, list[bool]] = {False: [], True: []}  # by: loosely
    state = random.getstate()
    for kind, settings in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        for loosely, followed in found.items():
            # what three published prompts ask for ("the letter #") the checks do not take, and draw another
            random.seed(0)
            try:
                followed.append(follows(row["prompt"], kind, settings, answer, loosely))
            except FOREIGN:  # IFBench divides by the number of words, say, where an answer has none
                followed.append(False)
                failed += 1
    random.setstate(state)
    return Followed(found[False], found[True], failed)


def figures_of(checked: Sequence[Followed]) -> Figures:
    """The shares of the prompts whose instructions are all followed, and of the single instructions, with errors."""
    figures: Figures = {}
    for mode in ("strict", "loose"):
        groups: list[list[bool]] = [getattr(one, mode) for one in checked]
        for name, of in (("prompt", [[all(group)] for group in groups]), ("instruction", groups)):
            figures |= _named(f"{name}_{mode}", share(of))
    return figures


def kinds_of(kinds: Sequence[Sequence[str]], checked: Sequence[Followed]) -> dict[str, dict[str, float]]:
    """For each kind of instruction: how many there are, and the shares that are followed, with errors.

    kinds: of each prompt's instructions.
    """
    made: dict[str, dict[str, float]] = {}
    for kind in sorted({kind for each in kinds for kind in each}):
        figures: Figures = {"instructions": sum(each.count(kind) for each in kinds)}
        for mode in ("strict", "loose"):
            groups: dict[int, list[bool]] = defaultdict(list)  # by prompt
            for prompt, (names, one) in enumerate(zip(kinds, checked, strict=True)):
                for name, followed in zip(names, getattr(one, mode), strict=True):
                    if name == kind:
                        groups[prompt].append(followed)
            figures |= _named(mode, share(list(groups.values())))
        made[kind] = figures
    return made


def _named(name: str, found: Share) -> Figures:
    error = {} if found.standard_error is None else {f"{name}_standard_error": found.standard_error}
    return {f"{name}_percent": found.percent, **error}


def share(groups: Sequence[Sequence[float]]) -> Share:
    """The percentage of instructions that are followed (1, else 0), which come in groups: one for each prompt.

    The standard error is clustered by prompt. One answer decides all of a prompt's instructions (an empty one breaks
    them all), so they are no independent draws; prompts are. It is that of a ratio of two sums over n prompts,
    sqrt(n / (n - 1) * sum_i (followed_i - percent * instructions_i)^2) / instructions. With one instruction a prompt
    that is the usual standard error of a mean.
    """
    prompts, instructions = len(groups), sum(map(len, groups))
    mean = sum(map(sum, groups)) / instructions
    if prompts == 1:
        return Share(100 * mean, None)
    squares = sum((sum(group) - mean * len(group)) ** 2 for group in groups)
    return Share(100 * mean, 100 * math.sqrt(prompts / (prompts - 1) * squares) / instructions)


def fetch_nltk_data(suite: str, *wanted: str) -> None:
    """See that NLTK finds `wanted` (such as tokenizers/punkt_tab), or get it into HF_HOME/nltk_data.

    Raises SPPOError that says how to fetch it.
    """
    import nltk
    from huggingface_hub import constants

    place = str(Path(constants.HF_HOME).expanduser() / "nltk_data")
    if place not in nltk.data.path:
        nltk.data.path.append(place)
    for name in wanted:
        if _has_nltk_data(name):
            continue
        try:
            if constants.HF_HUB_OFFLINE:
                raise OSError("HF_HUB_OFFLINE is set")
            settings = {"download_dir": place, "quiet": True, "raise_on_error": True, "print_error_to": io.StringIO()}
            nltk.download(name.split("/")[1], **settings)
        except (OSError, ValueError) as error:
            raise SPPOError(
                f"NLTK's {name} is not here, and cannot be fetched ({first_line(error)}). Where there is a network: "
                f"bash scripts/evaluate.sh --suite {suite} --fetch; then copy HF_HOME. Or put it below a directory "
                "that NLTK_DATA names."
            ) from None
        if not _has_nltk_data(name):
            raise SPPOError(
                f"NLTK does not take {name} from {place}, where it is now. It takes nothing that others may change: "
                f"chmod -R go-w {place}"
            )


def _has_nltk_data(name: str) -> bool:
    import nltk

    try:
        nltk.data.find(name)
    except LookupError:
        return False
    return True

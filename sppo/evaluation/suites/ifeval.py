"""IFEval (arXiv 2311.07911): 541 prompts with 25 kinds of instruction, checked by lm-eval's copy of the published code.

Model cards mean different things by "IFEval": one of the four shares, or a mean of several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sppo.evaluation.suites.instructions import fetch_nltk_data, read_prompts, run_checks
from sppo.evaluation.suites.suite import Order, SuiteJudge, hub_files

JUDGE = ""
DATASET, PROMPTS = "google/IFEval", "ifeval_input_data.jsonl"
NLTK_DATA = ("tokenizers/punkt_tab/english",)


def load_questions(order: Order) -> list[dict[str, Any]]:
    """The prompts: {key, prompt, instruction_id_list, kwargs}. Raises SPPOError where they, or NLTK's data, are not."""
    fetch_nltk_data("ifeval", *NLTK_DATA)  # before the import below, which would download what is not here
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    path = Path(order.questions) if order.questions else hub_files(DATASET, "dataset", [PROMPTS])[0]
    return read_prompts(order, path, INSTRUCTION_DICT, is_given=bool)  # lm-eval takes a 0 for not given


def run_suite(order: Order, rows: list[dict[str, Any]], judge: SuiteJudge | None) -> None:
    """Answer, check, and write figures.json and checked.jsonl."""
    run_checks(order, rows, follows, "lm_eval")


def follows(prompt: str, kind: str, settings: dict[str, Any], answer: str, loosely: bool) -> bool:
    """Whether an answer follows an instruction of a prompt, by lm-eval's code."""
    import langdetect
    from lm_eval.tasks.ifeval import utils

    langdetect.DetectorFactory.seed = 0  # else it draws, and may find another language in the same text
    row = utils.InputExample(key=0, instruction_id_list=[kind], prompt=prompt, kwargs=[settings])
    test = utils.test_instruction_following_loose if loosely else utils.test_instruction_following_strict
    return test(row, answer).follow_all_instructions

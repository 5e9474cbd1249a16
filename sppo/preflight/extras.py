"""--extra_responses, looked at before a run starts: whether each prompt has its answers, and whether these template."""

from __future__ import annotations

from typing import Any

from sppo.command.errors import SPPOError
from sppo.generation.extras import Extras, Templater
from sppo.preflight.facts import Model, PromptSet, Run
from sppo.preflight.findings import Look, many, no, ok


def check_extras(run: Run, prompts: list[PromptSet], model: Model | None, tokenizer: Any) -> Look[None]:
    """Each iteration's file against the ids of its prompts. Notes in `prompts` how many answers each prompt has."""
    recipe = run.recipe
    if not recipe.extra_responses:
        return
    for number, made in [(number, each) for each in prompts for number in each.iterations]:
        try:
            extras = Extras(recipe.extra_responses.replace("{iter}", str(number)))
            made.extra[number] = extras.each(made.ids)
            for prompt_id, messages in zip(made.asked, made.conversations, strict=True):
                extras.refuse_other_prompt(prompt_id, messages)
        except SPPOError as error:
            yield no(f"iteration {number}: {error}")
            continue
        if model is not None and made.asked:
            first, stop_ids = made.asked[0], model.policy.stop_ids(tokenizer)
            try:
                templater = Templater(tokenizer, stop_ids, recipe.chat_template_kwargs)
                templater.response(made.conversations[0], extras.answers[first][0])
            except ValueError as error:
                yield no(f"iteration {number}: {extras.what}: prompt {first}: {error}")
                continue
        each, k = made.extra[number], recipe.pairs
        yield ok(f"iteration {number}: {many(each, 'answer')} of other models a prompt, ranked beside the {k} drawn")

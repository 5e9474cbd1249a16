"""What the shards of one generation share: the policy, the prompts, and the fingerprints of both."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError
from sppo.generation.engines import pick_engine, prompt_seed
from sppo.generation.extras import Extras
from sppo.generation.prompts import Prompt, fingerprint, load_prompts
from sppo.models.dates import today
from sppo.models.policy import Policy, policy_of
from sppo.models.thoughts import marks_of
from sppo.recipe import Recipe, parse_part
from sppo.store.manifest import Stage
from sppo.store.shards import Slice, begun_identities, known_count, overwriting_since, shard_paths

# Prompts of an iteration whose responses keep the engine's log-probs, for the trainer to compare with its own.
SAMPLED = 32
# The settings, beside the engine and the rows, that decide a shard's responses.
_SETTINGS = (
    *("pairs", "temperature", "top_p", "maxlen", "seed"),
    *("prompt_seeds", "system_prompt", "chat_template_kwargs"),
)


@dataclass
class Source:
    """The policy and the prompts of one generation.

    `sampled`: the prompts whose responses keep the engine's log-probs: the same, however the shards are cut.
    `date`: of Policy.date_identity. `thinking`: of Policy.thinking_identity, with the budget where there is one.
    """

    recipe: Recipe
    policy: Policy
    prompts: list[Prompt]
    inputs: dict[str, Any]
    sampled: set[str]
    date: dict[str, str]
    thinking: dict[str, Any]

    @classmethod
    def of(cls, recipe: Recipe) -> Source:
        """The recipe's policy and prompts: its --prompts_part of them. Only reads.

        Raises SPPOError for --thinking_budget where nothing is thought.
        """
        policy = policy_of(recipe)
        prompts = load_prompts(recipe.prompts, recipe, parse_part(recipe.prompts_part))
        inputs = {"model": policy.identity(), "prompts": fingerprint(prompts), "prompts_total": len(prompts)}
        ids = sorted((p.prompt_id for p in prompts), key=lambda i: prompt_seed(recipe.seed, i))
        date = policy.date_identity(recipe.chat_template_kwargs)
        return cls(recipe, policy, prompts, inputs, set(ids[:SAMPLED]), date, _thinking(recipe, policy))

    def stage(self, output_dir: Path, shard: Slice) -> Stage:
        """The stage that makes a shard."""
        path, manifest, journal = shard_paths(output_dir / "responses", shard.data_frac)
        settings = {
            "rows": list(shard.bounds(len(self.prompts))),
            "engine": pick_engine(self.recipe.engine),
            **{key: getattr(self.recipe, key) for key in _SETTINGS},
            **({} if self.recipe.dtype == "auto" else {"dtype": self.recipe.dtype}),
            **self.date,
            **self.thinking,
        }
        return Stage("generate", manifest, [path], self.inputs, settings, journal)

    def check_extras(self) -> None:
        """Raise SPPOError where --extra_responses has not the same number of answers for each prompt, or answers to
        others. Only reads.
        """
        if self.recipe.extra_responses:
            extras, asked = Extras(self.recipe.extra_responses), [p for p in self.prompts if not p.skip]
            extras.each([prompt.prompt_id for prompt in asked])
            for prompt in asked:
                extras.refuse_other_prompt(prompt.prompt_id, prompt.messages)

    def check_dtype(self) -> None:
        """Raise SPPOError for --dtype without vLLM, which alone reads it. Only reads."""
        if self.recipe.dtype != "auto" and pick_engine(self.recipe.engine) != "vllm":
            raise SPPOError(f"--dtype {self.recipe.dtype} is for vLLM; with --engine transformers leave it out")

    def check_marks(self) -> None:
        """Raise SPPOError where generation would stop at what ends a thought, or a budget would end none.

        Only reads.
        """
        if not self.thinking:
            return
        tokenizer, recipe = self.policy.tokenizer(), self.recipe
        stop_ids = self.policy.stop_ids(tokenizer)
        marks = marks_of(tokenizer, stop_ids, recipe.chat_template_kwargs, recipe.thinking_tags)
        if marks is None and recipe.thinking_budget:
            raise SPPOError(
                f"--thinking_budget {recipe.thinking_budget}: the chat template of {recipe.model} closes an empty "
                "thought in the prompt, with these --chat_template_kwargs, so nothing is thought; leave it out"
            )

    def refuse_others(self, output_dir: Path, frac_len: int = 0) -> None:
        """Raise SPPOError where a shard here was made otherwise, before any process begins. Changes nothing."""
        count = known_count(output_dir / "responses")
        for number in range(count):
            self.stage(output_dir, Slice(frac_len, number, count)).refuse_others()


def _thinking(recipe: Recipe, policy: Policy) -> dict[str, Any]:
    found: dict[str, Any] = policy.thinking_identity(recipe.thinking_tags, recipe.chat_template_kwargs)
    if not recipe.thinking_budget:
        return found
    if not found:
        raise SPPOError(
            f"--thinking_budget {recipe.thinking_budget}: the chat template of {recipe.model} shows no marks of a "
            "thought, or --chat_template_kwargs switch thinking off; leave the budget out, or name the marks: "
            "--thinking_tags OPEN,CLOSE"
        )
    return {**found, "thinking_budget": recipe.thinking_budget}


def as_begun(recipe: Recipe, output_dir: Path, overwrite: bool = False) -> Recipe:
    """The recipe with what the shards here began with, where it leaves that open: the date, the marks.

    With `overwrite`, as where none has begun; but the day is that on which all of them began to be made again.
    """
    shards = output_dir / "responses"
    begun = [] if overwrite else begun_identities(shards)
    settings = begun[0]["settings"] if begun else None
    since = overwriting_since(shards) if overwrite else ""
    return _with_thinking(_with_date(recipe, settings, since), settings)


def _with_date(recipe: Recipe, begun: dict[str, Any] | None, since: str) -> Recipe:
    """The recipe with the date for the chat template: its own, or the one of what has begun.

    Where nothing has, `since`, or else today. Shards of an older version name none: then it stays empty, which is today
    at each start, as it was for that version.
    """
    if recipe.date:
        return recipe
    return dataclasses.replace(recipe, date=since or today() if begun is None else begun.get("date", ""))


def _with_thinking(recipe: Recipe, begun: dict[str, Any] | None) -> Recipe:
    """The recipe with --thinking_tags off where shards have begun without marks: so had older versions."""
    is_split = begun is None or "thinking" in begun
    if is_split or recipe.thinking_tags != "auto" or recipe.thinking_budget:
        return recipe
    return dataclasses.replace(recipe, thinking_tags="off")

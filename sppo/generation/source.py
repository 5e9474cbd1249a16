"""What the shards of one generation share: the policy, the prompts, and the fingerprints of both."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo.generation.engines import pick_engine, prompt_seed
from sppo.generation.extras import Extras
from sppo.generation.prompts import Prompt, fingerprint, load_prompts
from sppo.models.dates import today
from sppo.models.policy import Policy, policy_of
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
    `date`: of Policy.date_identity.
    """

    recipe: Recipe
    policy: Policy
    prompts: list[Prompt]
    inputs: dict[str, Any]
    sampled: set[str]
    date: dict[str, str]

    @classmethod
    def of(cls, recipe: Recipe) -> Source:
        """The recipe's policy and prompts: its --prompts_part of them. Only reads."""
        policy = policy_of(recipe)
        prompts = load_prompts(recipe.prompts, recipe, parse_part(recipe.prompts_part))
        inputs = {"model": policy.identity(), "prompts": fingerprint(prompts), "prompts_total": len(prompts)}
        ids = sorted((p.prompt_id for p in prompts), key=lambda i: prompt_seed(recipe.seed, i))
        date = policy.date_identity(recipe.chat_template_kwargs)
        return cls(recipe, policy, prompts, inputs, set(ids[:SAMPLED]), date)

    def stage(self, output_dir: Path, shard: Slice) -> Stage:
        """The stage that makes a shard."""
        path, manifest, journal = shard_paths(output_dir / "responses", shard.data_frac)
        settings = {
            "rows": list(shard.bounds(len(self.prompts))),
            "engine": pick_engine(self.recipe.engine),
            **{key: getattr(self.recipe, key) for key in _SETTINGS},
            **self.date,
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

    def refuse_others(self, output_dir: Path, frac_len: int = 0) -> None:
        """Raise SPPOError where a shard here was made otherwise, before any process begins. Changes nothing."""
        count = known_count(output_dir / "responses")
        for number in range(count):
            self.stage(output_dir, Slice(frac_len, number, count)).refuse_others()


def with_date(recipe: Recipe, output_dir: Path, overwrite: bool = False) -> Recipe:
    """The recipe with the date for the chat template: its own, or the one that the shards here began with.

    Today where none has begun; with `overwrite` the day on which all of them began to be made again. Shards of an older
    version name none: then it stays empty, which is today at each start, as it was for that version.
    """
    shards = output_dir / "responses"
    begun = [] if overwrite or recipe.date else begun_identities(shards)
    if begun:
        return dataclasses.replace(recipe, date=begun[0]["settings"].get("date", ""))
    since = overwriting_since(shards) if overwrite else ""
    return dataclasses.replace(recipe, date=recipe.date or since or today())

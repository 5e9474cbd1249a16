"""What the shards of one generation share: the policy, the prompts, and the fingerprints of both.

A large file of prompts is read once: $DATA/prompts.parquet keeps them, and each shard reads its own rows of that. A
small one is read again by each process.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.command.errors import SPPOError
from sppo.generation.engines import pick_engine, prompt_seed
from sppo.generation.prompts import Prompt, fingerprint, load_prompts
from sppo.models.policy import Policy, policy_of
from sppo.recipe import Recipe
from sppo.store.manifest import Stage, read_manifest
from sppo.store.parquet import read_rows, write_parquet
from sppo.store.shards import Slice, known_count, shard_paths

if TYPE_CHECKING:
    import pyarrow as pa

# Prompts of an iteration whose responses keep the engine's log-probs, for the trainer to compare with its own.
SAMPLED = 32
# Of what is skipped and how texts are read: 1 left tool calls out, 2 the column `system`.
_RULES = 3
LARGE = 20_000  # prompts from which on they are kept in $DATA/prompts.parquet
# The settings, beside the engine and the rows, that decide a shard's responses.
_SETTINGS = (
    *("pairs", "temperature", "top_p", "maxlen", "seed"),
    *("prompt_seeds", "system_prompt", "chat_template_kwargs"),
)


@dataclass
class Source:
    """The policy and the prompts of one generation.

    `sampled`: the prompts whose responses keep the engine's log-probs: the same, however the shards are cut.
    """

    recipe: Recipe
    part: tuple[int, int]
    policy: Policy
    total: int
    inputs: dict[str, Any]
    sampled: set[str]
    prompts: list[Prompt] | Path  # all of them, or the file that holds them

    @classmethod
    def of(cls, recipe: Recipe, part: tuple[int, int], output_dir: Path) -> Source:
        """The recipe's policy and prompts; of the prompts every n-th from the i-th on, part = (i, n). Only reads."""
        policy = policy_of(recipe)
        kept = _kept_prompts(recipe, part, output_dir)
        if kept and kept.is_current():
            written = read_manifest(kept.manifest, "fingerprint", "sampled")
            prompts, total = kept.outputs[0], written["counts"]["prompts"]
            identity, sampled = written["fingerprint"], set(written["sampled"])
        else:
            prompts = load_prompts(recipe.prompts, recipe, part)
            total, identity = len(prompts), fingerprint(prompts)
            ids = sorted((p.prompt_id for p in prompts), key=lambda i: prompt_seed(recipe.seed, i))
            sampled = set(ids[:SAMPLED])
        inputs = {"model": policy.identity(), "prompts": identity, "prompts_total": total}
        return cls(recipe, part, policy, total, inputs, sampled, prompts)

    def keep(self, output_dir: Path) -> None:
        """Keep a large file's prompts in $DATA/prompts.parquet, so that the next process need not read the file."""
        kept = _kept_prompts(self.recipe, self.part, output_dir)
        if kept and isinstance(self.prompts, list) and self.total >= LARGE:
            write_parquet(kept.outputs[0], _schema(), map(_row, self.prompts), batch=4096)
            kept.finish({"prompts": self.total}, fingerprint=self.inputs["prompts"], sampled=sorted(self.sampled))
            self.prompts = kept.outputs[0]

    def rows(self, start: int, stop: int) -> list[Prompt]:
        """The prompts of these rows."""
        if isinstance(self.prompts, list):
            return self.prompts[start:stop]
        found = read_rows(self.prompts, ["prompt_id", "messages", "skip"], start, stop)
        return [Prompt(row["prompt_id"], json.loads(row["messages"]), row["skip"]) for row in found]

    def stage(self, output_dir: Path, shard: Slice) -> Stage:
        """The stage that makes a shard."""
        path, manifest, journal = shard_paths(output_dir / "responses", shard.data_frac)
        settings = {
            "rows": list(shard.bounds(self.total)),
            "engine": pick_engine(self.recipe.engine),
            **{key: getattr(self.recipe, key) for key in _SETTINGS},
        }
        return Stage("generate", manifest, [path], self.inputs, settings, journal)

    def refuse_others(self, output_dir: Path, frac_len: int = 0) -> None:
        """Raise SPPOError where a shard here was made otherwise, before any process begins. Changes nothing."""
        count = known_count(output_dir / "responses")
        for number in range(count):
            self.stage(output_dir, Slice(frac_len, number, count)).refuse_others()


def _kept_prompts(recipe: Recipe, part: tuple[int, int], output_dir: Path) -> Stage | None:
    """The stage that makes $DATA/prompts.parquet.

    None unless the prompts are one file: of anything else it cannot be told quickly whether it has changed.
    """
    path = Path(recipe.prompts).expanduser()
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise SPPOError(f"prompts {path}: {error.strerror}") from None
    settings = {
        "column": recipe.prompt_column,
        "part": list(part),
        "seed": recipe.seed,
        "suffix": path.suffix,
        "rules": _RULES,
    }
    outputs = [output_dir / "prompts.parquet"]
    return Stage("prompts", output_dir / "prompts.manifest.json", outputs, {"content": content}, settings)


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in ("prompt_id", "messages", "skip")])


def _row(prompt: Prompt) -> dict[str, str]:
    return {"prompt_id": prompt.prompt_id, "messages": json.dumps(prompt.messages), "skip": prompt.skip}

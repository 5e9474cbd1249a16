"""The shards of generation put together, after checking that they belong together."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError, UsageError
from sppo.generation.extras import Extras, Templater, extras_file
from sppo.generation.prompts import fingerprint, load_prompts
from sppo.models import chat
from sppo.models.policy import policy_of
from sppo.models.thoughts import marks_of
from sppo.recipe import Recipe
from sppo.schema import MANY_UNFINISHED, responses_schema
from sppo.store.files import digest
from sppo.store.manifest import Stage, read_manifest
from sppo.store.parquet import open_parquet, read_rows, write_parquet
from sppo.store.responses import EXTRA, require_responses
from sppo.store.shards import known_count, shard_paths

# of the answers of other models, in the counts of responses.parquet's manifest
_CUT, _ENDS_WITHIN = "extra_responses_cut", "extra_responses_with_an_end_within"
# What is counted of the responses of a model that thinks.
OF_THOUGHTS = ("thought_tokens", "unfinished_thoughts", "thoughts_cut_at_budget")


def combine_stage(output_dir: Path, numgpu: int, pairs: int, extra_responses: str = "") -> Stage:
    """The stage that makes $DATA/responses.parquet of the shards 0..numgpu-1, which are there."""
    shards = [shard_paths(output_dir / "responses", i).parquet for i in range(numgpu)]
    inputs = {path.name: digest(path) for path in shards}
    if extra_responses:
        inputs["extra_responses"] = digest(extras_file(extra_responses))
    return Stage(
        "combine",
        output_dir / "responses.manifest.json",
        [output_dir / "responses.parquet"],
        inputs=inputs,
        settings={"pairs": pairs},
    )


def combine(
    output_dir: Path, numgpu: int, pairs: int, overwrite: bool, frac_len: int = 0, recipe: Recipe | None = None
) -> None:
    """Put the shards 0..numgpu-1 together into $DATA/responses.parquet, with the recipe's --extra_responses if any.

    Raises SPPOError unless the shards are as they were written, were made alike, with K responses a prompt, and cover
    every prompt exactly once.
    """
    directory = output_dir / "responses"
    manifests = _finished_shards(directory, numgpu)
    _refuse_unlike(manifests, directory, pairs)
    total = manifests[0]["inputs"]["prompts_total"]
    _refuse_gaps(manifests, directory, total, frac_len)
    stage = combine_stage(output_dir, numgpu, pairs, recipe.extra_responses if recipe else "")
    names = [shard_paths(directory, i).parquet.name for i in range(numgpu)]
    for name, manifest in zip(names, manifests, strict=True):
        if manifest["outputs"].get(name) != stage.inputs[name]:
            raise SPPOError(f"{directory / name} changed after it was written; delete it and run generate.py again")

    if not overwrite and not stage.make_ready():
        return
    joined = _Joined(recipe, directory, manifests) if recipe and recipe.extra_responses else None
    if overwrite and not stage.make_ready(overwrite):  # the old one may go now that a new one can be made
        return
    stage.begin()
    path = stage.outputs[0]
    rows = itertools.chain.from_iterable(_rows(directory / name) for name in names)
    written = write_parquet(path, responses_schema(), map(joined.row, rows) if joined else rows)
    skipped = [one for manifest in manifests for one in manifest["skipped"]]
    reasons = dict(Counter(one["reason"] for one in skipped))
    if not written:
        path.unlink()
        raise SPPOError(f"no prompt was answered; skipped: {reasons}")

    counts: dict[str, Any] = {"prompts": total, "skipped": reasons}
    of_thoughts = OF_THOUGHTS if "thinking" in manifests[0]["settings"] else ()
    for key in ("written", "responses", "response_tokens", "cut_at_maxlen", *of_thoughts):
        counts[key] = sum(manifest["counts"][key] for manifest in manifests)
    counts |= joined.counts if joined else {}
    stage.finish(counts, skipped=skipped, generated=_generated(manifests[0]))
    print(f"combine: {path}: {json.dumps(counts)}")
    if joined:
        joined.warn()
    if of_thoughts and (said := unfinished_warning(counts)):
        print(f"combine: warning: {said}")


def unfinished_warning(counts: dict[str, Any]) -> str:
    """What to do where thoughts did not end in many of the responses that a manifest counts; "" where few are so."""
    unfinished, total = counts.get("unfinished_thoughts", 0), counts["responses"]
    if unfinished <= MANY_UNFINISHED * total:
        return ""
    return (
        f"{unfinished} of {total} responses have no answer: their thought did not end within --maxlen, or they ended "
        "within it; raise --maxlen, or end thoughts with --thinking_budget"
    )


class _Joined:
    """The answers of other models, ready to be put behind the drawn responses. `counts`: for the manifest.

    Raises SPPOError for prompts without them or with another prompt's, and for another tokenizer than that of the model
    which drew.
    """

    def __init__(self, recipe: Recipe, directory: Path, manifests: list[dict[str, Any]]) -> None:
        self.extras = Extras(recipe.extra_responses)
        paths = [shard_paths(directory, i).parquet for i in range(len(manifests))]
        ids: list[str] = []
        for row in itertools.chain.from_iterable(read_rows(path, ["prompt_id", "prompt"]) for path in paths):
            ids.append(row["prompt_id"])
            self.extras.refuse_other_prompt(row["prompt_id"], row["prompt"])
        each = self.extras.each(ids)
        self.counts = {"extra_responses": len(ids) * each, EXTRA: each, _CUT: 0, _ENDS_WITHIN: 0}

        name = recipe.model or manifests[0]["model"]
        settings = manifests[0]["settings"]
        policy = policy_of(dataclasses.replace(recipe, model=name, date=settings.get("date", "")))
        tokenizer = policy.tokenizer()
        made = {row["tokenizer"] for path in paths for row in itertools.islice(read_rows(path, ["tokenizer"]), 1)}
        if made - {chat.tokenizer_identity(tokenizer)}:
            raise SPPOError(
                f"{self.extras.what}: {name} has another tokenizer than the model that drew {directory}; pass --model"
            )
        stop_ids, kwargs, tags = policy.stop_ids(tokenizer), settings["chat_template_kwargs"], settings.get("thinking")
        marks = marks_of(tokenizer, stop_ids, kwargs, ",".join(tags)) if tags else None
        self.templater = Templater(tokenizer, stop_ids, kwargs, marks)

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A shard's row with the answers of other models behind its responses, which are counted."""
        answers = self.extras.answers[row["prompt_id"]]
        try:
            extra = [self.templater.response(row["prompt"], answer) for answer in answers]
        except ValueError as error:
            raise SPPOError(f"{self.extras.what}: prompt {row['prompt_id']}: {error}") from None
        self.counts[_CUT] += sum(response["finish_reason"] == "length" for response in extra)
        self.counts[_ENDS_WITHIN] += sum(map(self.templater.has_end_within, extra))
        return {**row, "responses": [*row["responses"], *extra]}

    def warn(self) -> None:
        if count := self.counts[_ENDS_WITHIN]:
            print(
                f"combine: warning: {self.extras.what}: {count} answers spell an end of turn within their text; what "
                "follows it, perhaps another turn, counts as a part of the answer and is trained on"
            )


def _rows(shard: Path) -> Iterator[dict[str, Any]]:
    """The rows of a shard; of an older version's, without the columns that it did not know."""
    there = open_parquet(shard, []).schema_arrow.names
    return read_rows(shard, [name for name in responses_schema().names if name in there])


def _generated(manifest: dict[str, Any]) -> dict[str, Any]:
    """What all responses were made from, by the manifest of a shard."""
    made = {**manifest["settings"], **manifest["inputs"], "model_name": manifest["model"]}
    made.pop("rows")
    return {**made, "source": manifest["source"], "names": manifest.get("names", {})}


def _finished_shards(directory: Path, numgpu: int) -> list[dict[str, Any]]:
    """The manifests of the shards. Raises SPPOError where one is not finished, or more were laid out."""
    if numgpu < 1:
        raise UsageError(f"--numgpu {numgpu}: 1 or more")
    known = known_count(directory)
    if numgpu < known:
        raise SPPOError(f"{directory} is made in {known} shards, so there are some beyond --numgpu {numgpu}")
    paths = [shard_paths(directory, i).manifest for i in range(numgpu)]
    absent = [str(path) for path in paths if not path.exists()]
    if absent:
        raise SPPOError(f"shards that are not finished: {', '.join(absent)}; run generate.py for them")
    return [read_manifest(path) for path in paths]


def _refuse_unlike(manifests: list[dict[str, Any]], directory: Path, pairs: int) -> None:
    """Raise SPPOError unless all shards were made with the same inputs and settings, and K is `pairs`."""
    first = _shared(manifests[0])
    for number, manifest in enumerate(manifests):
        here = _shared(manifest)  # settings at their defaults may be left out, here or there
        differing = [key for key in {**first, **here} if first.get(key) != here.get(key)]
        if differing:
            raise SPPOError(
                f"{directory}: shards 0 and {number} differ in {', '.join(differing)}; make all with one setting"
            )
    if first["pairs"] != pairs:
        raise SPPOError(f"{directory}: the shards hold {first['pairs']} responses a prompt, not --pairs {pairs}")


def _shared(manifest: dict[str, Any]) -> dict[str, Any]:
    """What all shards of one generation have in common."""
    return {**manifest["inputs"], **{key: v for key, v in manifest["settings"].items() if key != "rows"}}


def _refuse_gaps(manifests: list[dict[str, Any]], directory: Path, total: int, frac_len: int) -> None:
    """Raise SPPOError unless the shards' rows follow each other from the first prompt to the last."""
    expected = 0
    for number, manifest in enumerate(manifests):
        start, stop = manifest["settings"]["rows"]
        if start != expected:
            raise SPPOError(
                f"{directory}: shard {number} starts at row {start}, not {expected}; check --frac_len and --data_frac"
            )
        expected = stop
    if expected != total:
        raise SPPOError(f"{directory}: the shards end at row {expected} of {total}; some were not generated")
    first, last = manifests[0]["settings"]["rows"]
    if frac_len and last - first != min(frac_len, total):
        raise SPPOError(f"{directory}: the shards have {last - first} rows, not --frac_len {frac_len}")


def refuse_other_prompts(output_dir: Path, prompts: str | None) -> None:
    """Raise SPPOError unless responses.parquet was made from `prompts` as they are now. None checks nothing."""
    if prompts is None:
        return
    require_responses(output_dir)
    manifest = output_dir / "responses.manifest.json"
    if not manifest.exists():
        raise SPPOError(f"--prompts: {manifest} is not there, so nothing says what the responses were made from")
    generated = read_manifest(manifest, "generated")["generated"]
    source = dict(generated["source"])
    first, parts = source.pop("part")
    source["prompts"] = prompts
    if fingerprint(load_prompts(prompts, Recipe(**source), (first, parts))) != generated["prompts"]:
        raise SPPOError(f"the responses in {output_dir} were not made from {prompts} as it is now; generate them again")

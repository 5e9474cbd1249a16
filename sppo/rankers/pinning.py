"""Pins the ranker to one commit on the Hub for a whole run: a branch may move between two shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sppo.command.errors import OtherWorkError, SPPOError
from sppo.models.files import commit_of
from sppo.rankers import backend
from sppo.recipe import Recipe
from sppo.schema import content_id
from sppo.store.files import read_json, write_json
from sppo.store.journal import differences
from sppo.store.manifest import read_manifest
from sppo.store.shards import begun_shards, shard_paths


def _pin_file(data_dir: Path) -> Path:
    return data_dir / "ranker.json"


def _read_pin(data_dir: Path) -> dict[str, str]:
    """What preload() wrote: `ranker`, the revision that was `asked` for, and its commit as `revision`; {} without it.

    Raises SPPOError where the file is damaged.
    """
    path = _pin_file(data_dir)
    if not path.exists():
        return {}
    written = read_json(path)
    found = written if isinstance(written, dict) else {}
    pin = {key: found[key] for key in ("ranker", "asked", "revision") if isinstance(found.get(key), str)}
    if len(pin) < 3 or found.get("check") != content_id(pin):
        raise SPPOError(f"{path} is damaged; delete it and run preload.py again")
    return pin


def pinned(recipe: Recipe, data_dir: Path) -> Recipe:
    """The recipe with the commit of its ranker that preload.py wrote into $DATA/ranker.json, if it did.

    All iterations of a run have the ranker of the first one.
    """
    pin = _read_pin(data_dir)
    if not pin and recipe.run_dir:
        pin = _read_pin(Path(recipe.run_dir) / "iter1" / "data")
    if not pin or pin["ranker"] != recipe.ranker or recipe.ranker_revision not in (pin["asked"], pin["revision"]):
        return recipe
    return dataclasses.replace(recipe, ranker_revision=pin["revision"])


def preload(recipe: Recipe, data_dir: Path | None, overwrite: bool = False) -> None:
    """Fetch the ranker, and write the commit that the Hub gave into $DATA/ranker.json.

    Raises OtherWorkError where another ranker, or another commit of it, has begun the ranking in $DATA.
    """
    wanted = pinned(recipe, data_dir) if data_dir else recipe
    where = backend(wanted).fetch(wanted)
    commit = commit_of(Path(where))
    if data_dir and commit and wanted.ranker_revision != commit:
        pin = {"ranker": recipe.ranker, "asked": recipe.ranker_revision, "revision": commit}
        if not overwrite:
            _refuse_another(pin, data_dir)
        write_json(_pin_file(data_dir), {**pin, "check": content_id(pin)})
    print(f"preload: {recipe.ranker} is at {where}" + (f"; pinned to --ranker_revision {commit}" if commit else ""))


def _refuse_another(pin: dict[str, str], data_dir: Path) -> None:
    """Raise OtherWorkError where the ranking in $DATA was begun under another pin, or by another ranker without one."""
    ranking = data_dir / "ranking"
    begun = begun_shards(ranking)
    if not begun:
        return
    there = _read_pin(data_dir)
    if not there:
        manifests = [shard_paths(ranking, number).manifest for number in begun]
        rankers = sorted(read_manifest(manifest)["ranker"] for manifest in manifests if manifest.exists())
        there = {"ranker": rankers[0]} if rankers else {}
    if changed := differences(there, {key: pin[key] for key in there}):
        raise OtherWorkError("\n  ".join([f"{ranking} is the work of another ranker:", *changed]))

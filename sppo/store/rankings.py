"""$DATA/ranking, as the stages behind ranking find it: our shards, or another tool's files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sppo.command.errors import SPPOError, UsageError
from sppo.store.journal import differences
from sppo.store.manifest import read_manifest, refuse_changed
from sppo.store.parquet import open_parquet
from sppo.store.shards import begun_shards, known_count, shard_paths


def ranking_files(output_dir: Path) -> list[Path]:
    """The rankings in $DATA: the shards that were laid out, all of them. Where none were, the files of another tool.

    Raises SPPOError where there are none, where a shard is not finished, and where both kinds are there.
    """
    directory = output_dir / "ranking"
    count, there = known_count(directory), sorted(directory.glob("*.parquet"))
    if not there:
        raise SPPOError(f"{directory} holds no ranking; run rank.py first")
    if not count or not begun_shards(directory):
        return there
    paths = [shard_paths(directory, i)[:2] for i in range(count)]
    absent = [path.name for path, manifest in paths if not (path.exists() and manifest.exists())]
    if absent:
        raise SPPOError(
            f"{directory} is made in {count} shards, and not ranked are {', '.join(absent)}; run rank.py first"
        )
    others = [path.name for path in there if not (path.stem.startswith("shard-") and path.stem[6:].isdecimal())]
    if others:
        raise SPPOError(
            f"{directory} holds {', '.join(others)} besides the {count} shards of rank.py; move one of the two away"
        )
    return [path for path, _ in paths]


def set_aside(files: list[Path]) -> dict[str, int]:
    """How many prompts were set aside in ranking, by reason, as the manifests tell."""
    found: Counter[str] = Counter()
    for path in files:
        if (manifest := path.with_suffix(".manifest.json")).exists():
            found.update(read_manifest(manifest)["counts"].get("skipped", {}))
    return dict(found)


def backend_of(files: list[Path]) -> str:
    """The `ranker_backend` that made rankings, as their manifests tell. Raises UsageError where one has none."""
    found = ""
    for path in files:
        manifest = path.with_suffix(".manifest.json")
        ranker = read_manifest(manifest)["inputs"].get("ranker") if manifest.exists() else None
        found = ranker.get("backend", "") if isinstance(ranker, dict) else ""
        if not found:
            raise UsageError(
                f"--estimator auto: {path} has no manifest that names its ranker, as rank.py writes it; pass "
                "--estimator released for logits of a PairRM, --estimator paper for all others"
            )
    return found  # check_rankings refuses rankings of more than one


def check_rankings(files: list[Path], responses: Path, read: str) -> None:
    """Raise SPPOError unless rankings were made of these responses, by one ranker, and leave no row out.

    read: the digest of `responses`. A file without a manifest is another tool's, and is taken as it is.
    """
    found = {path: read_manifest(m) for path in files if (m := path.with_suffix(".manifest.json")).exists()}
    for path, manifest in found.items():
        refuse_changed(path, path.with_suffix(".manifest.json"), "Run rank.py again, which makes it again")
        if manifest["inputs"].get("responses") != read:
            raise SPPOError(f"{path} ranks other responses than {responses} holds; run rank.py --overwrite first")
    rankers = {path: manifest["inputs"].get("ranker") for path, manifest in found.items()}
    for path, ranker in rankers.items():
        first = next(iter(rankers))
        if changed := differences(rankers[first], ranker, "ranker"):
            said = "\n  ".join([f"{first.name} and {path.name} are not of one ranker:", *changed])
            raise SPPOError(f"{first.parent}: {said}\nRank all shards with one; --overwrite makes a shard again.")
    if len(found) == len(files):
        total = open_parquet(responses, []).metadata.num_rows
        _refuse_gaps([manifest["settings"].get("rows", [0, total]) for manifest in found.values()], responses, total)


def _refuse_gaps(rows: list[list[int]], responses: Path, total: int) -> None:
    """Raise SPPOError where a row belongs to no shard: one that was never ranked."""
    end = 0
    for start, stop in [*sorted(rows), [total, total]]:
        if start > end:
            raise SPPOError(f"rows {end} to {start} of {responses} were never ranked; run rank.py for their shard")
        end = max(end, stop)

"""The file that is trained on: where it is, and which of its columns a loss reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError, cause_line
from sppo.recipe import Recipe
from sppo.schema import BESIDE, REQUIRED
from sppo.store.files import atomic, digest
from sppo.store.manifest import await_written, read_manifest
from sppo.store.parquet import open_parquet

ALL_RESPONSES = ["prompt", "responses", "probability"]  # what sppo_all reads instead of the pair
RATES = ["chosen_probs", "chosen_probs_win", "chosen_probs_lose"]
WITHOUT_RATES = ("sigmoid", "hinge", "ipo", "ipo_mean", "kto_pair")  # losses of chosen and rejected alone
# Read where they are there: with them, what was generated is trained on, token for token.
GENERATED = "prompt responses chosen rejected chosen_index rejected_index prompt_token_ids tokenizer system".split()
GENERATED += ["prompt_thoughts", *RATES, *BESIDE]


def columns(loss_type: str) -> list[str]:
    """The columns that a data set needs for a loss."""
    if loss_type == "sppo_all":
        return ALL_RESPONSES
    return [c for c in REQUIRED["train"] if c not in RATES or loss_type not in WITHOUT_RATES]


def is_as_written(path: Path) -> bool:
    """Whether a file is what compute_prob.py wrote, by the manifest beside it: then nobody has edited its texts."""
    manifest = path.with_name("train.manifest.json")
    return manifest.exists() and read_manifest(manifest)["outputs"].get(path.name) == digest(path)


def open_dataset(path: Path, recipe: Recipe) -> Any:
    """The open Parquet file. Raises SPPOError where it has not the columns that the recipe's loss needs."""
    parquet = open_parquet(path, [])
    missing = [c for c in columns(recipe.loss_type) if c not in parquet.schema_arrow.names]
    if missing and recipe.loss_type == "sppo_all":
        raise SPPOError(
            f"{path} has no column {', '.join(missing)}: --loss_type sppo_all trains on all K responses of a prompt, "
            "so it needs the train.parquet that compute_prob.py writes; use --loss_type sppo for pairs"
        )
    return open_parquet(path, columns(recipe.loss_type))


def dataset_file(dataset: str, recipe: Recipe) -> Path:
    """The Parquet file to train on: a file, a $DATA directory's train.parquet, or a Hub data set's train split."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        path = path / "train.parquet"
    if path.suffix == ".parquet" or dataset.startswith((".", "/", "~")):
        await_written(path, path.with_name("train.manifest.json"))
        open_dataset(path, recipe)
        return path
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        loaded = datasets.load_dataset(dataset, split="train", revision=recipe.prompts_revision or None)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError, DatasetsError) as error:
        said = cause_line(error)
        raise SPPOError(f"--dataset {dataset}: no such directory, and the Hub does not give it: {said}") from None
    exported = Path(loaded.cache_files[0]["filename"]).with_suffix(".sppo.parquet")
    if not exported.exists():
        with atomic(exported) as temporary:
            loaded.to_parquet(str(temporary))
    open_dataset(exported, recipe)
    return exported

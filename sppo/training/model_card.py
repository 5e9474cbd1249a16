"""The card of a trained model: what it is, from what, and with which settings. No local path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sppo.models.cards import PAPER, table
from sppo.models.files import public_name
from sppo.recipe import Recipe, reads_anchor
from sppo.store.manifest import versions


def write_card(
    directory: Path,
    recipe: Recipe,
    data_name: str,
    data_digest: str,
    metrics: dict[str, Any],
    counts: dict[str, int],
    settings: Sequence[str],
) -> None:
    """README.md of a trained model: base model, data, recipe (the keys in `settings`), metrics, versions."""
    from huggingface_hub import ModelCardData

    base = public_name(recipe.model)
    kind = ", as a LoRA adapter" if recipe.use_peft else ""
    head = ModelCardData(
        base_model=base if base == recipe.model and "/" in base else None,  # the Hub refuses a base that is not on it
        library_name="peft" if recipe.use_peft else "transformers",
        tags=["sppo", "alignment"],
    )
    text = "\n".join(
        [
            "---",
            head.to_yaml(),
            "---",
            "",
            f"# SPPO, iteration {metrics['iteration']}",
            "",
            f"Trained from {base} with {PAPER}{kind}, on {data_name} (sha256 {data_digest[:16]}).",
            *_pull(recipe),
            "",
            "## Data",
            *table("count", counts),
            "## Metrics",
            "The losses are means over all steps, the rest is the last step's.",
            "",
            *table("metric", {k: f"{v:.6g}" for k, v in metrics.items() if isinstance(v, float)}),
            "## Settings",
            *table("setting", {k: getattr(recipe, k) for k in ["global_batch_size", *settings]}),
            "## Versions",
            *table("package", versions()),
        ]
    )
    (directory / "README.md").write_text(text, encoding="utf-8")


def _pull(recipe: Recipe) -> list[str]:
    """The line about what the training was pulled towards, if it was."""
    if not reads_anchor(recipe):
        return []
    how = "RSPO (arXiv 2503.00030)" if recipe.reg != "none" else "an anchor"
    return [f"It is pulled towards {public_name(recipe.anchor_model)} by {how}."]

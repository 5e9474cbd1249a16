"""The card of a data set on the Hub: what it holds, from what, and with which settings. No local path."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sppo.models.cards import PAPER, table
from sppo.schema import MEANING
from sppo.store.files import read_json
from sppo.store.parquet import open_parquet
from sppo.store.responses import EXTRA

_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
_OF_THOUGHTS = {  # counts of the responses of a model that thinks
    "thought_tokens": "of these tokens before an answer: thoughts and marks",
    "unfinished_thoughts": "responses without an answer, because the thought did not end",
    "thoughts_cut_at_budget": "thoughts ended by thinking_budget",
}
_ABOUT = {  # the statistics of train.manifest.json (see pairing/statistics.py)
    "pairs": "ordered comparisons",
    "tied_pairs": "pairs with win rate 1/2",
    "certain_pairs": "share of pairs with a preference beyond 0.99 or below 0.01",
    "even_pairs": "share of pairs with a preference within 0.01 of 1/2",
    "intransitive_triples": "share of triples that go round in a circle",
    "circular_share": "share of the log-odds, squared, that goes round in circles and that no score explains",
    "position_bias": "position bias: above 0, what is shown first wins",
    "score_length_correlation": "correlation of score and length within a prompt",
    "win_rate_length_correlation": "correlation of win rate and length within a prompt, after any length penalty",
}


def data_card(repo: str, tag: str, splits: list[str], output_dir: Path) -> str:
    """README.md of one of $DATA's repositories: with a split `test` the training set, else all K responses a prompt.

    Everything in it comes from the manifests. Where another tool made the data and left none, those parts are left out.
    """
    from huggingface_hub import DatasetCardData

    train = read_json(output_dir / "train.manifest.json")
    responses = output_dir / "responses.manifest.json"
    drawn = read_json(responses) if responses.exists() else {}
    manifests = [(output_dir / "ranking" / name).with_suffix(".manifest.json") for name in train["inputs"]["ranking"]]
    ranked = [read_json(path) for path in manifests if path.exists()]
    counts, k = train["counts"], train["settings"]["pairs"]
    extra = drawn.get("counts", {}).get(EXTRA, 0)  # the last of the k
    rows = counts["train"] + counts["test"]
    head = DatasetCardData(
        pretty_name=repo.split("/")[1],
        tags=["sppo", "preference", "synthetic"],
        task_categories=["text-generation"],
        size_categories=[next((size for limit, size in _SIZES.items() if rows < limit), "n>10M")],
        configs=[
            {"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}-*"} for s in splits]},
        ],
    )
    if "test" in splits:
        what = "the best and a worse response to each prompt, with their win rates: what a policy is trained on"
        columns = {c: MEANING[c] for c in open_parquet(output_dir / "train.parquet", []).schema_arrow.names}
    else:
        what = f"all K = {k} responses to each prompt, with their win rates against each other"
        columns = {c: MEANING[c] for c in ("prompt_id", "prompt", "probability", "rm_scores")}
        columns |= {f"generate_{i}": f"the conversation with response {i}" for i in range(k - extra)}
        others = range(k - extra, k)
        columns |= {f"generate_{i}": f"the conversation with response {i}, another model's" for i in others}
    return "\n".join(
        [
            *["---", head.to_yaml(), "---", ""],
            f"# {repo}",
            "",
            f"An iteration of {PAPER}: {what}. {_made_by(k, extra)} compared in pairs by a preference model, each pair "
            "both ways round.",
            "",
            *["```python", "from datasets import load_dataset", ""],
            *[f'load_dataset("{repo}", revision="{tag}")', "```", ""],
            "## Columns",
            *table("column", columns),
            "## How it was made",
            *table("setting", _settings(train, drawn, ranked)),
            "## Counts",
            *table("count", _counts(counts, drawn, ranked)),
            "## Statistics",
            "Of all ranked prompts; `p`, `p_win` and `p_lose` (columns `chosen_probs*`) of the pairs that are kept.",
            "",
            *table("statistic", {about: counts[key] for key, about in _ABOUT.items() if key in counts}),
            *["| win rate | mean | quantiles 0, 1/4, 1/2, 3/4, 1 |", "|---|---|---|"],
            *[f"| {p} | {counts[p]['mean']} | {counts[p]['quantiles']} |" for p in ("p", "p_win", "p_lose")],
            "",
            "## Versions",
            *table("package", train["versions"]),
        ]
    )


def _made_by(k: int, extra: int) -> str:
    """Where a prompt's k responses come from, of which the last `extra` are other models'."""
    if not extra:
        return "Responses were drawn from the policy and"
    return (
        f"Of each prompt's {k} responses the first {k - extra} were drawn from the policy, and the last {extra} are "
        "other models' answers. So a win rate is against that mixture. All were"
    )


def _settings(train: dict[str, Any], drawn: dict[str, Any], ranked: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that decided the data. Names only: no local paths, and no fingerprints."""
    made = drawn.get("generated", {})
    names = {"policy": "model", "prompts": "prompts"}
    shown = {label: made["names"][name] for label, name in names.items() if name in made.get("names", {})}
    keys = "engine temperature top_p maxlen seed prompt_seeds system_prompt chat_template_kwargs thinking".split()
    keys += ["thinking_budget", "date"]
    shown |= {key: made[key] for key in keys if key in made}
    for manifest in ranked[:1]:  # all shards were made alike
        ranker = manifest["inputs"]["ranker"]
        shown |= {"ranker": manifest.get("ranker_name", ""), "ranker_backend": ranker["backend"]}
        shown |= {key: ranker[key] for key in ("ranker_prompt", "ranker_system") if key in ranker}
    settings = train["settings"]
    shown |= {"K": settings["pairs"], "seed": shown.get("seed", settings["seed"])}
    keys = ("estimator", "ranker_temperature", "length_penalty", "select", "min_margin", "test_size", "keep_degenerate")
    return shown | {key: settings[key] for key in keys if key in settings}


def _counts(counts: dict[str, Any], drawn: dict[str, Any], ranked: list[dict[str, Any]]) -> dict[str, Any]:
    """Prompts and responses from the first to the last, with what was left out on the way and why."""
    shown: dict[str, Any] = {}
    if drawn:
        asked = drawn["counts"]
        shown["prompts"] = asked["prompts"]
        shown |= {f"skipped: {reason}": n for reason, n in asked["skipped"].items()}
        shown |= {"prompts answered": asked["written"], "responses": asked["responses"]}
        if "extra_responses" in asked:
            shown["answers of other models"] = asked["extra_responses"]
        shown |= {"tokens in responses": asked["response_tokens"], "responses cut at maxlen": asked["cut_at_maxlen"]}
        shown |= {about: asked[key] for key, about in _OF_THOUGHTS.items() if key in asked}
    shown["prompts ranked"] = counts["prompts"]
    if ranked:
        shown["texts cut for the ranker"] = sum(m["counts"]["texts_cut_for_the_ranker"] for m in ranked)
        left = sum((Counter(m["counts"]["skipped"]) for m in ranked), Counter())
        shown |= {f"not ranked: {reason}": n for reason, n in left.items()}
    shown |= {f"dropped: {reason}": n for reason, n in counts["dropped"].items()}
    return shown | {"rows in train": counts["train"], "rows in test": counts["test"]}

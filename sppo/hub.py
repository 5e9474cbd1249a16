"""An iteration's data on the Hub, as the released scripts name it: after it exists here, and only when asked."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sppo.errors import SPPOError, UsageError
from sppo.files import open_parquet, read_json, read_rows, write_parquet

T = TypeVar("T")
_TRIES, _PAUSE = 4, 2.0  # of a request that meets network trouble; seconds before the second try


def push(output_dir: Path, org: str, name: str, public: bool) -> list[str]:
    """Push $DATA to <org>/data-<name>_generated and <org>/synthetic_data_<name>_score; returns their names.

    Everything is prepared locally first; each repository is one commit, private unless `public`. Raises SPPOError
    when the Hub refuses or stays out of reach; nothing local is touched.
    """
    if not re.fullmatch(r"[\w-][\w.-]*", org) or not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UsageError(f"--org {org!r} --name {name!r}: letters, digits, '.', '_' and '-' only")
    train, test = output_dir / "train.parquet", output_dir / "test.parquet"
    manifest = output_dir / "train.manifest.json"
    for path in (train, test, manifest):
        if not path.exists():
            raise SPPOError(f"{path} does not exist; run compute_prob.py first")
    counts = read_json(manifest)["counts"]
    settings = read_json(manifest)["settings"]
    pushed = []
    with tempfile.TemporaryDirectory(prefix="sppo-hub-") as scratch:  # mode 0700
        generated, score = Path(scratch) / "generated", Path(scratch) / "score"
        _write_generated(train, test, generated / "data" / "train-00000-of-00001.parquet", settings["pairs"])
        (score / "data").mkdir(parents=True)
        for split, path in (("train", train), ("test", test)):
            (score / "data" / f"{split}-00000-of-00001.parquet").symlink_to(path.resolve())
        for folder, repo in (
            (generated, f"{org}/data-{name}_generated"),
            (score, f"{org}/synthetic_data_{name}_score"),
        ):
            (folder / "README.md").write_text(_card(repo, folder, counts, settings), encoding="utf-8")
            _upload(folder, repo, public)
            pushed.append(repo)
    return pushed


def _upload(folder: Path, repo: str, public: bool) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    _retried(lambda: api.create_repo(repo, repo_type="dataset", private=not public, exist_ok=True), repo)
    _retried(
        lambda: api.upload_folder(
            folder_path=folder, repo_id=repo, repo_type="dataset", commit_message="Add SPPO data"
        ),
        repo,
    )


def _retried(call: Callable[[], T], repo: str) -> T:
    """Try again on network trouble and the server's own (5xx, 429); a refusal is final."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    for attempt in range(_TRIES):
        try:
            return call()
        except LocalTokenNotFoundError:
            raise SPPOError(f"pushing {repo} needs a token: set HF_TOKEN or run `hf auth login`") from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            first = next(iter(str(error).strip().splitlines()), "")
            if status < 500 and status != 429:
                raise SPPOError(f"the Hub refuses {repo} ({status}): {first}. The data is safe here.") from None
            trouble = first
        except OSError as error:  # connection errors of every HTTP library end here
            trouble = f"{type(error).__name__}: {error}"
        if attempt + 1 < _TRIES:
            time.sleep(_PAUSE * 2**attempt)
    raise SPPOError(
        f"the Hub is out of reach for {repo} after {_TRIES} tries ({trouble}). The data is safe here; "
        "run the same push_to_hub.py command again."
    )


def _write_generated(train: Path, test: Path, target: Path, pairs: int) -> None:
    """The released layout: prompt columns, generate_0..K-1 as message lists, probability, rm_scores."""
    import pyarrow as pa

    schema = open_parquet(train, []).schema_arrow
    conversation = schema.field("prompt").type
    columns = [("prompt_id", pa.string()), ("prompt", conversation)]
    columns += [(f"generate_{k}", conversation) for k in range(pairs)]
    columns += [(c, schema.field(c).type) for c in ("probability", "rm_scores")]

    def rows() -> Iterator[dict[str, Any]]:
        for path in (train, test):
            for row in read_rows(path, ["prompt_id", "prompt", "responses", "probability", "rm_scores"]):
                for k, response in enumerate(row.pop("responses")):
                    row[f"generate_{k}"] = [*row["prompt"], {"role": "assistant", "content": response["text"]}]
                yield row

    write_parquet(target, pa.schema(columns), rows())


def _card(repo: str, folder: Path, counts: dict[str, Any], settings: dict[str, Any]) -> str:
    """A data set card: tags, how it was made, counts and statistics. No paths, no tokens."""
    files = sorted(p.stem.split("-")[0] for p in (folder / "data").iterdir())
    configs = "\n".join(f"  - split: {s}\n    path: data/{s}-*" for s in files)
    shown = {k: v for k, v in settings.items() if k != "seed"}
    return (
        f"---\ntags: [sppo, preference, synthetic]\nconfigs:\n- config_name: default\n  data_files:\n{configs}\n---\n\n"
        f"# {repo}\n\nMade by the SPPO pipeline (Self-Play Preference Optimization, arXiv 2405.00675): responses drawn "
        "from the policy, compared in pairs by a preference model.\n\n"
        f"Settings: `{json.dumps(shown)}`\n\n```json\n{json.dumps(counts, indent=2)}\n```\n"
    )

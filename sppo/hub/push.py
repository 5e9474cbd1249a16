"""What is pushed to the Hub: data sets and models, only when asked, and only what is complete here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sppo.cli import flags
from sppo.command.errors import RUN, SPPOError, UsageError
from sppo.command.search_path import ROOT
from sppo.hub.data_card import data_card
from sppo.hub.upload import Files, Record, upload
from sppo.models.files import public_name
from sppo.store.files import changed, digest, digest_of, read_json
from sppo.store.locks import alone
from sppo.store.manifest import MANIFEST, read_manifest
from sppo.store.parquet import open_parquet, read_rows, write_parquet

SCRIPT = ROOT / "scripts" / "push_to_hub.py"


def command(org: str, name: str, public: bool, output_dir: Path | None = None, model_dir: Path | None = None) -> list:
    """The command that pushes this, from any directory. It holds no token."""
    places = {"output_dir": output_dir, "model_dir": model_dir}
    made = [sys.executable, str(SCRIPT), *flags(**{k: p.absolute() for k, p in places.items() if p})]
    return [*made, *flags(org=org, name=name), *(["--public"] if public else [])]


def note_push(places: list[Path | None], again: str) -> None:
    """Keep, beside each place of a run, the command that pushes it, until it is pushed: then `again` is "".

    The end of the run names what is left, however the push failed.
    """
    for place in filter(None, places):
        note = place.absolute().parent / f"unpushed-{place.name}.txt"
        if not again:
            note.unlink(missing_ok=True)
        elif RUN in os.environ:
            note.write_text(f"{again}\n", encoding="utf-8")


def unpushed(run_dir: Path) -> list[str]:
    """The commands that push what a run could not push."""
    return [note.read_text(encoding="utf-8").strip() for note in sorted(run_dir.glob("iter*/unpushed-*.txt"))]


def check_name(org: str, name: str) -> None:
    """Raise UsageError for what the Hub takes for no repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for repo in (f"{org}/data-{name}_generated", f"{org}/synthetic_data_{name}_score", f"{org}/{name}"):
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise UsageError(f"--org {org!r} --name {name!r}: {error}") from None


def tag_of(name: str, fingerprint: str) -> str:
    """iter3 for a name that ends so, else the beginning of the content's digest."""
    found = re.search(r"(?<![A-Za-z0-9])iter\d+$", name)
    return found[0] if found else fingerprint[:12]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _whole(manifest: Path, maker: str) -> dict[str, Any]:
    """What a manifest says. Raises SPPOError where it is not there, or its outputs are not what was written."""
    if not manifest.exists():
        raise SPPOError(f"{manifest} does not exist, so there is nothing whole to push; run {maker} first")
    written = read_manifest(manifest)
    if names := changed(manifest.parent, written["outputs"]):
        raise SPPOError(
            f"{manifest.parent}: {', '.join(names)} changed since it was written, or is gone, so nothing was pushed; "
            f"run {maker} again, or what else made it"
        )
    return written


def push_data(output_dir: Path, org: str, name: str, public: bool) -> None:
    """Push $DATA to <org>/data-<name>_generated and <org>/synthetic_data_<name>_score, one commit each.

    Raises SPPOError when the Hub refuses or stays out of reach. What arrived is remembered in $DATA/pushed.json.
    """
    check_name(org, name)
    train, test = output_dir / "train.parquet", output_dir / "test.parquet"
    made = _whole(output_dir / "train.manifest.json", "compute_prob.py")
    of_train, of_test = (made["outputs"][path.name] for path in (train, test))
    tag = tag_of(name, of_train)
    record = output_dir / "pushed.json"
    in_train, in_test = (f"data/{split}-00000-of-00001.parquet" for split in ("train", "test"))
    lock = alone(output_dir / "pushed.json.lock", f"pushes {output_dir}")
    with lock, tempfile.TemporaryDirectory(prefix="sppo-hub-") as scratch:  # mode 0700
        # all responses of all prompts, in one split
        repo = f"{org}/data-{name}_generated"
        card = data_card(repo, tag, ["train"], output_dir).encode()
        digests = {in_train: f"{of_train}+{of_test}", "README.md": sha256(card)}
        generated = Record(record, repo, "dataset", public, digests)
        if not generated.is_done():
            both = Path(scratch) / "both.parquet"
            _write_generated(train, test, both, made["settings"]["pairs"])
            upload(generated, {"README.md": card, in_train: both}, tag)

        # the training set as it is
        repo = f"{org}/synthetic_data_{name}_score"
        card = data_card(repo, tag, ["train", "test"], output_dir).encode()
        digests = {in_train: of_train, in_test: of_test, "README.md": sha256(card)}
        scored = Record(record, repo, "dataset", public, digests)
        if not scored.is_done():
            upload(scored, {"README.md": card, in_train: train, in_test: test}, tag)


def push_model(model_dir: Path, org: str, name: str, public: bool) -> None:
    """Push $MODEL to <org>/<name>: weights, config, tokenizer, card, metrics and manifest, without local paths.

    What arrived is remembered beside the model, in pushed-<its name>.json. Raises SPPOError as push_data.
    """
    check_name(org, name)
    written = _whole(model_dir / MANIFEST, "pipeline.sh")
    files: Files = {name: _without_paths(model_dir / name) for name in _model_files(model_dir, written)}
    files[MANIFEST] = _with_digests(files)
    digests = {n: digest(content) if isinstance(content, Path) else sha256(content) for n, content in files.items()}
    path, repo = model_dir.absolute().parent / f"pushed-{model_dir.name}.json", f"{org}/{name}"
    with alone(path.with_name(path.name + ".lock"), f"pushes {model_dir}"):
        record = Record(path, repo, "model", public, digests)
        if not record.is_done():
            upload(record, files, tag_of(name, sha256(json.dumps(digests).encode())))
    adapter = model_dir / "adapter_config.json"
    if adapter.exists() and Path(read_json(adapter)["base_model_name_or_path"]).is_absolute():
        print(f"push_to_hub: {repo} is an adapter, and its base is a directory here: who loads it needs that base too")


def _model_files(model_dir: Path, written: dict[str, Any]) -> list[str]:
    """The files of a model that are pushed: all that its manifest knows."""
    others = [name for name in written.get("others", {}) if (model_dir / name).is_file()]
    return sorted({MANIFEST, *written["outputs"], *others})


def _with_digests(files: Files) -> bytes:
    """The manifest, with the digests of the files as they are pushed, which name no local paths."""
    manifest = files[MANIFEST]
    made = json.loads(manifest if isinstance(manifest, bytes) else manifest.read_text(encoding="utf-8"))
    for name, content in files.items():
        if isinstance(content, bytes) and name in made["outputs"]:
            made["outputs"][name] = digest_of(content)
    return (json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode()


def _without_paths(path: Path) -> Path | bytes:
    """The file itself, or a JSON's content where it names local paths: of those, the last component."""
    if path.suffix != ".json":
        return path

    def cleaned(value: Any) -> Any:
        if isinstance(value, list):
            return [cleaned(v) for v in value]
        if not isinstance(value, dict):
            return value
        return {
            k: public_name(v) if isinstance(v, str) and k.endswith(("name_or_path", "_file")) else cleaned(v)
            for k, v in value.items()
        }

    content = read_json(path)
    clean = cleaned(content)
    if path.name == MANIFEST and "models" in clean:  # of a mean
        clean["models"] = [public_name(model) for model in clean["models"]]
    elif path.name == MANIFEST:
        clean["model"] = clean.pop("model_name", None) or public_name(clean["model"])
    return path if clean == content else (json.dumps(clean, indent=2, ensure_ascii=False) + "\n").encode()


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

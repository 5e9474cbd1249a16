"""Pushing data sets and models to the Hub: only when asked, and only what is complete here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sppo.cli import flags
from sppo.command.errors import SPPOError, UsageError
from sppo.command.search_path import ROOT
from sppo.hub.data_card import data_card
from sppo.hub.errors import explain
from sppo.models.files import public_name
from sppo.store.files import changed, digest, digest_of, read_json, write_json
from sppo.store.locks import alone
from sppo.store.manifest import MANIFEST, read_manifest
from sppo.store.parquet import open_parquet, read_rows, write_parquet

T = TypeVar("T")
Files = dict[str, Path | bytes]  # by their paths in the repository
SCRIPT = ROOT / "scripts" / "push_to_hub.py"
_TRIES, _PAUSE = 4, 2.0  # of a request that meets network trouble; seconds before the second try


def command(org: str, name: str, public: bool, output_dir: Path | None = None, model_dir: Path | None = None) -> list:
    """The command that pushes this, from any directory. It holds no token."""
    places = {"output_dir": output_dir, "model_dir": model_dir}
    made = [sys.executable, str(SCRIPT), *flags(**{k: p.absolute() for k, p in places.items() if p})]
    return [*made, *flags(org=org, name=name), *(["--public"] if public else [])]


def note_failure(places: list[Path | None], again: str) -> None:
    """Keep, beside each place in a run, the command that pushes it, for the end of the run; with "" it is pushed."""
    for place in filter(None, places):
        note = place.absolute().parent / f"unpushed-{place.name}.txt"
        if not again:
            note.unlink(missing_ok=True)
        elif "SPPO_RUN" in os.environ:
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


def push_data(output_dir: Path, org: str, name: str, public: bool) -> None:
    """Push $DATA to <org>/data-<name>_generated and <org>/synthetic_data_<name>_score, one commit each.

    Raises SPPOError when the Hub refuses or stays out of reach. What arrived is remembered in $DATA/pushed.json.
    """
    check_name(org, name)
    train, test, manifest = (output_dir / n for n in ("train.parquet", "test.parquet", "train.manifest.json"))
    for path in (train, test, manifest):
        if not path.exists():
            raise SPPOError(f"{path} does not exist; run compute_prob.py first")
    made, found = read_json(manifest), {p.name: digest(p) for p in (train, test)}
    if made["outputs"] != found:
        raise SPPOError(f"{train} or {test.name} is not what {manifest.name} describes; run compute_prob.py again")
    tag = tag_of(name, found["train.parquet"])
    part = "data/{}-00000-of-00001.parquet".format
    lock = alone(output_dir / "pushed.json.lock", f"pushes {output_dir}")
    with lock, tempfile.TemporaryDirectory(prefix="sppo-hub-") as scratch:  # mode 0700
        both = Path(scratch) / "both.parquet"
        for repo, files, digests in (
            (f"{org}/data-{name}_generated", {part("train"): both}, {part("train"): "+".join(found.values())}),
            (
                f"{org}/synthetic_data_{name}_score",
                {part("train"): train, part("test"): test},
                {part("train"): found["train.parquet"], part("test"): found["test.parquet"]},
            ),
        ):
            card = data_card(repo, tag, [f.split("/")[1].split("-")[0] for f in files], output_dir).encode()
            digests["README.md"] = hashlib.sha256(card).hexdigest()
            record = _Record(output_dir / "pushed.json", repo, "dataset", public, digests)
            if record.is_done():
                continue
            if both in files.values():
                _write_generated(train, test, both, made["settings"]["pairs"])
            _push(record, {"README.md": card, **files}, tag)


def push_model(model_dir: Path, org: str, name: str, public: bool) -> None:
    """Push $MODEL to <org>/<name>: weights, config, tokenizer, card, metrics and manifest, without local paths.

    What arrived is remembered beside the model, in pushed-<its name>.json. Raises SPPOError as push_data.
    """
    check_name(org, name)
    manifest = model_dir / MANIFEST
    if not manifest.exists():
        raise SPPOError(f"{manifest} does not exist, so no finished training wrote {model_dir}; run pipeline.sh first")
    written = read_manifest(manifest)
    if names := changed(model_dir, written["outputs"]):
        raise SPPOError(
            f"{model_dir}: {', '.join(names)} changed since it was written, or is gone, so nothing was pushed; the "
            "command that made the model mends it"
        )
    files: Files = {name: _without_paths(model_dir / name) for name in _model_files(model_dir, written)}
    files[MANIFEST] = _with_digests(files)
    digests = {n: digest(f) if isinstance(f, Path) else hashlib.sha256(f).hexdigest() for n, f in files.items()}
    path, repo = model_dir.absolute().parent / f"pushed-{model_dir.name}.json", f"{org}/{name}"
    with alone(path.with_name(path.name + ".lock"), f"pushes {model_dir}"):
        record = _Record(path, repo, "model", public, digests)
        if not record.is_done():
            _push(record, files, tag_of(name, hashlib.sha256(json.dumps(digests).encode()).hexdigest()))
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


class _Record:
    """What was pushed to a repository, in a file beside the data or the model: so that it is pushed once."""

    def __init__(self, path: Path, repo: str, kind: str, public: bool, digests: dict[str, str]) -> None:
        from huggingface_hub import constants

        self.path, self.repo, self.kind, self.public = path, repo, kind, public
        self._all = read_json(path) if path.exists() else {}
        self.before = self._all.get(repo, {})
        where = urlsplit(constants.ENDPOINT).hostname  # not the whole: it may hold a password
        self._now = {"hub": where, "type": kind, "private": not public, "files": digests}

    def is_done(self) -> bool:
        done = all(self.before.get(k) == v for k, v in self._now.items())
        if done:
            print(f"push_to_hub: done: {self.repo}, commit {self.before['commit']}, tag {self.before['tag']}")
        return done

    def write(self, private: bool, commit: str, tag: str) -> None:
        write_json(self.path, {**self._all, self.repo: {**self._now, "private": private, "commit": commit, "tag": tag}})


def _push(record: _Record, files: Files, tag: str) -> None:
    """One commit and its tag. Raises SPPOError before any upload where the repository is public against our wish.

    Not with upload_folder: where hf_xet is installed it makes several commits of a large model.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings show signed addresses
    api, repo, kind = HfApi(token=True), record.repo, record.kind
    _retried(repo, lambda: api.create_repo(repo, repo_type=kind, private=not record.public, exist_ok=True))
    info = _retried(repo, lambda: api.repo_info(repo, repo_type=kind))
    if not info.private and not record.public:
        raise SPPOError(
            f"{repo} is public on the Hub already and --public was not given, so nothing was uploaded; pass --public, "
            "make it private in its settings there, or take another --name"
        )
    if info.private and record.public:
        print(f"push_to_hub: {repo} is there already and stays private; its settings on the Hub can change that")
    there = {sibling.rfilename for sibling in info.siblings or []}
    stale = (there & set(record.before.get("files", {}))) - set(files)  # ours of an earlier push: a shard less now
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    message = f"SPPO {tag}"
    commit = _retried(repo, lambda: api.create_commit(repo, operations, commit_message=message, repo_type=kind)).oid
    tags = {t.name: t.target_commit for t in _retried(repo, lambda: api.list_repo_refs(repo, repo_type=kind)).tags}
    if tags.get(tag, commit) != commit:
        _retried(repo, lambda: api.delete_tag(repo, tag=tag, repo_type=kind))
        print(f"push_to_hub: {repo}: tag {tag} moves from commit {tags.pop(tag)}, where the earlier files stay")
    if tag not in tags:
        _retried(repo, lambda: api.create_tag(repo, tag=tag, revision=commit, repo_type=kind, exist_ok=True))
    record.write(bool(info.private), commit, tag)
    print(f"push_to_hub: {repo}: {len(files)} files, {'private' if info.private else 'public'}, tag {tag}")


def _retried(repo: str, call: Callable[[], T]) -> T:
    """Try again where the trouble may pass; a refusal is final.

    The client itself tries again while it uploads and commits, and nowhere else.
    """
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    network = (TransportError, HfHubHTTPError, ConnectionError, TimeoutError)
    for attempt in range(_TRIES):
        try:
            return call()
        except (*network, LocalTokenNotFoundError, RuntimeError, ValueError) as error:
            trouble = explain(error)
        if not trouble.passes:
            raise SPPOError(f"pushing {repo}: {trouble}")
        if attempt + 1 < _TRIES:
            wait = max(_PAUSE * 2**attempt, trouble.wait)
            print(f"push_to_hub: {repo}: {trouble.text}; trying again in {wait:g} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    raise SPPOError(f"pushing {repo}: {trouble.text} (after {_TRIES} tries)")


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

"""One commit and its tag in a repository of the Hub, and a file here that remembers what arrived."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from sppo.command.errors import SPPOError
from sppo.hub.errors import explain
from sppo.store.files import read_json, write_json

T = TypeVar("T")
Files = dict[str, Path | bytes]  # by their paths in the repository
_TRIES, _PAUSE = 4, 2.0  # of a request that meets trouble which may pass; seconds before the second try


class Record:
    """What was pushed to a repository, in a file beside the data or the model: so that it is pushed once.

    digests: what would be pushed now, by its path in the repository. before: what the file says of the last push.
    """

    def __init__(
        self, path: Path, repo: str, kind: Literal["dataset", "model"], public: bool, digests: dict[str, str]
    ) -> None:
        from huggingface_hub import constants

        self.path, self.repo, self.kind, self.public = path, repo, kind, public
        self._all: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
        self.before = self._all.get(repo, {})
        where = urlsplit(constants.ENDPOINT).hostname  # not the whole: it may hold a password
        self._now = {"hub": where, "type": kind, "private": not public, "files": digests}

    def is_done(self) -> bool:
        """Whether all this was pushed already; then it says so."""
        done = all(self.before.get(key) == value for key, value in self._now.items())
        if done:
            print(f"push_to_hub: done: {self.repo}, commit {self.before['commit']}, tag {self.before['tag']}")
        return done

    def write(self, private: bool, commit: str, tag: str) -> None:
        arrived = {**self._now, "private": private, "commit": commit, "tag": tag}
        write_json(self.path, {**self._all, self.repo: arrived})


def upload(record: Record, files: Files, tag: str) -> None:
    """Push `files` in one commit, tag it, and keep that in the record. A repository that is not there is made.

    Not with upload_folder: where hf_xet is installed it makes several commits of a large model. Raises SPPOError where
    the Hub refuses or stays out of reach, and before any upload where the repository is public against our wish.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings show signed addresses
    api, repo, kind = HfApi(token=True), record.repo, record.kind
    _retried(api.create_repo, repo, repo_type=kind, private=not record.public, exist_ok=True)
    info = _retried(api.repo_info, repo, repo_type=kind)
    if not info.private and not record.public:
        raise SPPOError(
            f"{repo} is public on the Hub already and --public was not given, so nothing was uploaded; pass --public, "
            "make it private in its settings there, or take another --name"
        )
    if info.private and record.public:
        print(f"push_to_hub: {repo} is there already and stays private; its settings on the Hub can change that")

    # ours of an earlier push: a shard less now. Files of others stay
    there = {sibling.rfilename for sibling in getattr(info, "siblings", None) or []}
    stale = (there & set(record.before.get("files", {}))) - set(files)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    made = _retried(api.create_commit, repo, operations=operations, commit_message=f"SPPO {tag}", repo_type=kind)

    # the tag moves where an earlier push has set it
    refs = _retried(api.list_repo_refs, repo, repo_type=kind)
    tagged = next((ref.target_commit for ref in refs.tags if ref.name == tag), "")
    if tagged and tagged != made.oid:
        _retried(api.delete_tag, repo, tag=tag, repo_type=kind)
        print(f"push_to_hub: {repo}: tag {tag} moves from commit {tagged}, where the earlier files stay")
    if tagged != made.oid:
        _retried(api.create_tag, repo, tag=tag, revision=made.oid, repo_type=kind, exist_ok=True)

    record.write(bool(info.private), made.oid, tag)
    print(f"push_to_hub: {repo}: {len(files)} files, {'private' if info.private else 'public'}, tag {tag}")


def _retried(call: Callable[..., T], repo: str, **options: Any) -> T:
    """A method of the Hub's client, called again where the trouble may pass; a refusal is final.

    The client itself tries again while it uploads and commits, and nowhere else.
    """
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    network = (TransportError, HfHubHTTPError, ConnectionError, TimeoutError)
    for attempt in range(_TRIES):
        try:
            return call(repo, **options)
        except (*network, LocalTokenNotFoundError, RuntimeError, ValueError) as error:
            trouble = explain(error)
        if not trouble.passes:
            raise SPPOError(f"pushing {repo}: {trouble}")
        if attempt + 1 < _TRIES:
            wait = max(_PAUSE * 2**attempt, trouble.wait)
            print(f"push_to_hub: {repo}: {trouble.text}; trying again in {wait:g} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    raise SPPOError(f"pushing {repo}: {trouble.text} (after {_TRIES} tries)")

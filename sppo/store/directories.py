"""Directories that appear whole: the work beside them, what of them may be deleted, and whether they can be put there.

Every recursive delete of this project is here. What goes is a work directory, which carries a marker of ours from its
first moment, and an output of ours that is replaced, if its manifest knows every file in it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sppo.command.errors import SPPOError, UsageError
from sppo.store.files import follow_umask, sync_directory
from sppo.store.locks import hold, is_held
from sppo.store.manifest import MANIFEST, read_manifest

MARKER = "sppo.work"  # in a work directory: all in it is ours. Who is at work there holds a lock on it
FINAL = "final"  # in a work directory: what is put in place in the end


def target_of(output_dir: Path) -> Path:
    """The directory itself where `output_dir` is a link to it: the work is then on the target's disk, the link stays.

    Raises SPPOError for a link that leads nowhere.
    """
    real = Path(os.path.realpath(output_dir))
    if not output_dir.is_symlink():
        return real if output_dir.name in ("", "..") else output_dir
    if real.is_symlink() or not real.parent.is_dir():
        raise SPPOError(f"{output_dir} is a link to {real}, which cannot be made there; mend the link or remove it")
    return real


def work_of(target: Path) -> Path:
    """Where everything is until `target` is whole: beside it, on the same disk."""
    return target.with_name(target.name + ".partial")


def check_place(target: Path) -> None:
    """Raise SPPOError where no directory can be put at `target`, as far as can be seen without writing."""
    check_writable(target)
    check_writable(target.parent)
    if _is_mounted(target):
        raise SPPOError(
            f"{target} is a mount point, in whose place no finished directory can be put; name a directory in it: "
            f"{target / 'model'}"
        )


def check_writable(directory: Path) -> None:
    """Raise SPPOError where nothing can be written into a directory that is there, or is to be made."""
    if directory.is_symlink() and not directory.exists():
        raise SPPOError(f"{directory} is a link that leads nowhere; mend it or remove it")
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    if not directory.is_dir():
        raise SPPOError(f"{directory}: a file stands where a directory should be; name another path")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise SPPOError(f"{directory} cannot be written to; see to its permissions, or name another path")


def _is_mounted(path: Path) -> bool:
    """Whether a file system begins at `path`; one that is bound from elsewhere on the same disk counts."""
    real = os.path.realpath(path)
    if os.path.ismount(real):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # no Linux
        return False
    return os.fsencode(real) in (line.split()[4].decode("unicode_escape").encode("latin-1") for line in lines)


def unknown_files(directory: Path) -> list[str]:
    """The files in an output directory that its manifest does not know; all of them where there is no manifest."""
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    found = sorted(path.relative_to(directory).as_posix() for path in paths if not _is_of_system(path.name))
    if MANIFEST not in found:
        return found
    written = read_manifest(directory / MANIFEST)
    known = {MANIFEST, *written["outputs"], *written.get("others", {})}
    return [name for name in found if name not in known]


def _is_of_system(name: str) -> bool:
    """Whether a file is no one's work: what a file server or a file browser puts into any directory."""
    return name.startswith(".nfs") or name in (".DS_Store", "Thumbs.db")


def refuse_unknown(target: Path, maker: str = "") -> None:
    """Raise SPPOError where `target` holds a file that this project did not write, or another stage than `maker` did.

    What is there is replaced in the end. No flag changes this refusal. Raises UsageError for the current directory and
    those above it.
    """
    _refuse_current(target)
    if not target.exists():
        return
    if unknown := unknown_files(target):
        names = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise SPPOError(
            f"{target} holds files that this project did not make: {names}. They would be lost where the finished "
            "directory takes its place. Move them away, or name another directory; --overwrite does not change this"
        )
    if maker and (target / MANIFEST).exists():
        wrote = read_manifest(target / MANIFEST).get("stage")
        if wrote != maker:
            raise SPPOError(f"{target} is the work of another stage, {wrote}; name another directory")


def _refuse_current(target: Path) -> None:
    real, here = (Path(os.path.realpath(path)) for path in (target, Path.cwd()))
    if real in (here, *here.parents):
        what = "the current directory" if real == here else "a directory above the current one"
        raise UsageError(f"--output_dir {target} is {what}, which cannot be replaced; name a new one, in it")


def refuse_overlap(target: Path, models: list[Path]) -> None:
    """Raise UsageError where `target` is one of the models that are read, holds one, or is in one of ours."""
    real = Path(os.path.realpath(target))
    for model in models:
        read = Path(os.path.realpath(model))
        is_in_ours = read in real.parents and (read / MANIFEST).exists()
        if real == read or real in read.parents or is_in_ours:
            where = "is" if real == read else "holds" if real in read.parents else "is in"
            raise UsageError(f"--output_dir {target} {where} {model}, a model that is read; name another directory")


def refuse_busy(target: Path) -> None:
    """Raise SPPOError where another process is making `target`."""
    if is_held(work_of(target) / MARKER):
        raise _busy(target)


def _busy(target: Path) -> SPPOError:
    return SPPOError(f"another process is making {target}; wait for it or stop it")


@contextmanager
def working(target: Path, patience: float | None = None) -> Iterator[Path]:
    """The work directory of `target`, made if it is not there, and locked for this process, also where it is killed.

    It stays, for the next try; empty, it goes. Raises SPPOError where another process is making `target` (for longer
    than `patience`: see locks.lock), where the work directory is not ours, and where the end could not be written.
    """
    check_place(target)
    work = work_of(target)
    names = _names(work)
    if names and not any(name.startswith(MARKER) for name in names):
        raise SPPOError(
            f"{work} is where this work would be done, and it carries no mark of this project: "
            f"{', '.join(names[:3])}; move it away"
        )
    try:
        held = hold(work / MARKER, patience)
    except BlockingIOError:
        raise _busy(target) from None
    try:
        _try_rename(work, target)
        yield work
    finally:
        is_empty = all(name.startswith(MARKER) for name in _names(work))
        if is_empty:
            held.path.unlink(missing_ok=True)
        held.release()  # before the directory goes: NFS keeps a file that is open in it, under another name
        if is_empty:
            _remove_empty(work)


def _names(directory: Path) -> list[str]:
    """What is in a directory, in one look: another process may be deleting it."""
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def _remove_empty(directory: Path) -> None:
    with suppress(OSError):  # another process has begun in it, or has removed it
        directory.rmdir()


def _try_rename(work: Path, target: Path) -> None:
    """Raise SPPOError where a directory cannot be renamed to where `target` will be: not each disk can do that."""
    probe, there = work / "probe", target.with_name(f".{target.name}.probe")
    try:
        if there.exists():  # a kill has left it
            os.rename(there, probe)
        probe.mkdir(exist_ok=True)
        (probe / "file").touch()
        os.rename(probe, there)
        os.rename(there, probe)
    except OSError as error:
        raise SPPOError(
            f"a directory cannot be renamed in {target.parent} ({error.strerror}), which is how {target.name} appears "
            "in the end; name a directory on another disk"
        ) from None
    finally:
        if probe.exists():
            delete(probe)


def clear(work: Path) -> None:
    """Delete all that is in a work directory of ours."""
    _require_ours(work)
    for path in work.iterdir():
        if not path.name.startswith(MARKER):
            _remove(path)


def delete(directory: Path) -> None:
    """Delete a directory in a work directory of ours."""
    _require_ours(directory.parent)
    _remove(directory)


def _require_ours(work: Path) -> None:
    if not (work / MARKER).exists():
        raise SPPOError(f"{work} is no work directory of this project and is not emptied; move it away")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(target: Path) -> None:
    """Delete the work directory that a kill at the very end left beside a finished `target`."""
    work = work_of(target)
    if MARKER in _names(work):
        with suppress(SPPOError), working(target, patience=0):  # a process in its last moment does so itself
            clear(work)
    _remove_empty(work)


def put_in_place(final: Path, target: Path, maker: str = "") -> None:
    """Rename a whole directory in a work directory to `target`, in place of what is there, once it is on the disk."""
    refuse_unknown(target, maker)
    for path in final.rglob("*"):
        if path.is_file():
            follow_umask(path)
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
    before = final.with_name("replaced")
    if before.exists():
        delete(before)
    if target.exists():
        try:
            os.rename(target, before)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _delete_known(target)
    try:
        os.rename(final, target)
    except OSError:
        if before.exists():
            os.rename(before, target)
        raise
    sync_directory(target.parent)


def _delete_known(target: Path) -> None:
    """Delete an output of ours, all of whose files are known. The manifest goes last, so that a kill leaves them known.

    For overlayfs: it cannot rename a directory that lies in a container's image.
    """
    for path in target.iterdir():
        if path.name != MANIFEST:
            _remove(path)
    _remove(target)


@contextmanager
def appearing(target: Path, maker: str = "") -> Iterator[Path]:
    """A directory to fill, which becomes `target` where the block ends without an error. See working."""
    refuse_unknown(target, maker)
    with working(target) as work:
        clear(work)
        (work / FINAL).mkdir()
        yield work / FINAL
        put_in_place(work / FINAL, target, maker)
        clear(work)

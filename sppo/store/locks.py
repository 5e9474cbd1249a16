"""A lock on a file, also where the disk has none: some shared disks (NFS without a lock server, Lustre) lack flock.

Not by the package filelock. Without flock it takes the locked file's own existence for the lock, and ours is there
anyway: a marker, with what is in it. It does so for ENOSYS alone, while NFS says ENOLCK. Its record cannot name another
process than its own, or say that another machine's has to be deleted by hand. What is left for it is one call of flock.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sppo.command.errors import SPPOError

SHARED = "SPPO_SHARED"  # set by a cluster's launcher: other machines write what this process reads
_DEAD = 120.0  # seconds: a file server keeps the locks of a machine that died for some 90
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# what any look at a file may raise while another process is deleting it and its directory
_VANISHED = (errno.ENOENT, errno.EEXIST, errno.ESTALE)


def machine() -> str:
    """What tells processes of this machine from those of others, whatever the hosts are called.

    The kernel's boot, and the process namespace: in another container the same number is another process.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot[:8]}{os.stat('/proc/self/ns/pid').st_ino % 10**6:06d}"
    except OSError:  # no Linux
        return "here"


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is at work; another user's counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # a dead process is listed until its parent takes note of it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


def usual_patience() -> float:
    """How long to wait for a lock, in seconds. On one machine not at all: a process that was killed has none.

    On a cluster, or in a job that Slurm starts again, it may be that of a machine which has just died.
    """
    is_restarted = "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return _DEAD if SHARED in os.environ or is_restarted else 0.0


def lock(handle: IO[Any], path: Path, patience: float | None = None, pid: int | None = None) -> Path | None:
    """Lock an open file until it is closed, for this process, or for `pid`, which has it open too.

    Raises BlockingIOError where another process has it for longer than `patience`, in seconds (None: usual_patience).
    Where the disk has no locks it says so, and makes `<path>.owner`, which is returned, to be removed in the end. One
    that a process of this machine left when it was killed gives way; one of another machine cannot be asked, and
    raises SPPOError.
    """
    deadline, is_waiting = time.monotonic() + (usual_patience() if patience is None else patience), False
    while True:
        try:
            return _lock_at_once(handle, path, pid or os.getpid())
        except (BlockingIOError, SPPOError):
            if time.monotonic() >= deadline:
                raise
        if not is_waiting:
            print(f"{path.parent}: another process is at work here, and may be ending; waiting", flush=True)
        is_waiting = True
        time.sleep(0.2)


def _lock_at_once(handle: IO[Any], path: Path, pid: int) -> Path | None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    owner = path.with_name(path.name + ".owner")
    mine = json.dumps({"machine": machine(), "pid": pid})
    for _ in range(2):
        try:
            with open(owner, "x", encoding="utf-8") as out:
                out.write(mine)
            if pid == os.getpid():
                atexit.register(_remove_if_of, owner, mine)
            print(f"{path.parent}: this disk has no file locks; {owner.name} stands for one", flush=True)
            return owner
        except FileExistsError:
            _remove_if_dead(owner)
    raise BlockingIOError(errno.EWOULDBLOCK, "another process has it")


@dataclass
class Held:
    """A lock that this process has on a file, until it lets go or ends."""

    path: Path
    handle: IO[str]
    owner: Path | None  # see lock

    def write(self, text: str) -> None:
        """Make `text` the file's content, in place: a renamed file would be another one, without the lock."""
        self.handle.seek(0)
        self.handle.truncate()
        self.handle.write(text)
        self.handle.flush()
        os.fsync(self.handle.fileno())

    def release(self) -> None:
        self.handle.close()
        if self.owner:
            self.owner.unlink(missing_ok=True)


def hold(path: Path, patience: float | None = None) -> Held:
    """Lock the file at `path`, which is made if it is not there. Whoever holds it may delete it, and its directory.

    Raises BlockingIOError where another process has it for longer than `patience`: see lock.
    """
    vanished = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if held := _held(path, patience):
                return held
        except OSError as error:
            vanished += 1
            if error.errno not in _VANISHED or vanished == 100:
                raise
        time.sleep(0.01)


def _held(path: Path, patience: float | None) -> Held | None:
    """The lock; None where who had it before has deleted the file, so that a lock on that is worth nothing."""
    handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held until release()
    try:
        held = Held(path, handle, lock(handle, path, patience))
    except BaseException:
        handle.close()
        raise
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):
            return held
    held.release()
    return None


def is_held(path: Path) -> bool:
    """Whether another process has the lock on a file, for longer than usual_patience. Makes no file.

    To ask is to try: the lock is taken for a moment.
    """
    try:
        with open(path, "r+", encoding="utf-8") as handle:
            owner = lock(handle, path)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    if owner:
        owner.unlink(missing_ok=True)
    return False


@contextmanager
def alone(path: Path, what: str, keep: bool = False) -> Iterator[None]:
    """Hold a lock on `path`, a file for this alone. Raises SPPOError where another process is doing `what`.

    keep: the file stays, as a sign that somebody has begun here.
    """
    try:
        held = hold(path)
    except BlockingIOError:
        raise SPPOError(f"another process {what}; wait for it or stop it") from None
    try:
        yield
    finally:
        if not keep:
            path.unlink(missing_ok=True)
        held.release()


def _remove_if_of(owner: Path, mine: str) -> None:
    """Remove an owner's file where it is still this process's: one that ends without letting go leaves none behind."""
    with suppress(OSError):
        if owner.read_text(encoding="utf-8") == mine:
            owner.unlink()


def _remove_if_dead(owner: Path) -> None:
    """Raises BlockingIOError where its process is at work, SPPOError where that cannot be known."""
    try:
        found = json.loads(owner.read_text(encoding="utf-8"))
        there, pid = found["machine"], int(found["pid"])
    except FileNotFoundError:
        return  # its process has ended meanwhile
    except (ValueError, KeyError, TypeError):  # its process is writing it at this moment
        raise BlockingIOError(errno.EWOULDBLOCK, "another process has it") from None
    if there != machine():
        raise SPPOError(
            f"{owner}: a process of another machine is at work, or was when that machine died; if that machine is "
            "gone, delete this file"
        )
    if is_alive(pid):
        raise BlockingIOError(errno.EWOULDBLOCK, "another process has it")
    owner.unlink(missing_ok=True)

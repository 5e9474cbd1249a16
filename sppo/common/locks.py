"""A lock on a file, also where the disk has none: some shared disks (NFS without a lock server, Lustre) lack flock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from sppo.common.errors import SPPOError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


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


def lock(handle: IO[Any], path: Path) -> Path | None:
    """Lock an open file until it is closed. Raises BlockingIOError where another process has it.

    Where the disk has no locks it says so, and makes `<path>.owner`, which is returned, to be removed in the end. One
    that a process of this machine left when it was killed gives way; one of another machine cannot be asked, and
    raises SPPOError.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    owner = path.with_name(path.name + ".owner")
    mine = json.dumps({"machine": machine(), "pid": os.getpid()})
    for _ in range(2):
        try:
            with open(owner, "x", encoding="utf-8") as out:
                out.write(mine)
            print(f"{path.parent}: this disk has no file locks; {owner.name} stands for one", flush=True)
            return owner
        except FileExistsError:
            _remove_if_dead(owner)
    raise BlockingIOError(errno.EWOULDBLOCK, "another process has it")


def _remove_if_dead(owner: Path) -> None:
    try:
        found = json.loads(owner.read_text(encoding="utf-8"))
        there, pid = found["machine"], int(found["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        there, pid = "", 0
    if there != machine():
        raise SPPOError(
            f"{owner}: another machine's process is at work, or was when it died; if it did, delete that file"
        )
    if is_alive(pid):
        raise BlockingIOError(errno.EWOULDBLOCK, "another process has it")
    owner.unlink(missing_ok=True)

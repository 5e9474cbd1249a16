"""The journal of a shard: what a process had finished before it was killed is kept."""

from __future__ import annotations

import hashlib
import json
import os
from io import BufferedRandom
from pathlib import Path
from typing import Any

from sppo.command.errors import OtherWorkError, SPPOError


class Journal:
    """Finished items of a shard, one line each, so that a killed process loses only what it had not finished.

    A line is a checksum, the item's key and its JSON. The first line holds the identity (inputs and settings) that the
    items were made under. The identity is part of every line's checksum, so items of another identity are not taken. A
    damaged line (the last one before a kill) is dropped, and its item is made again. Only offsets are in memory. Who
    writes it holds a lock: its stage's, or its directory's.

    Raises SPPOError where it holds items of another identity, and leaves them as they are. `advice`: what the message
    says one can do. overwrite: such items are deleted instead; those of this identity are kept.
    """

    def __init__(self, path: Path, identity: dict[str, Any], overwrite: bool = False, advice: str = "") -> None:
        if not overwrite:
            refuse_another(path, identity, advice)
        self.path = path
        self.done: dict[str, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BufferedRandom = open(path, "a+b")  # noqa: SIM115 - held until close() or remove()
        self._scan(identity)

    def _scan(self, identity: dict[str, Any]) -> None:
        self._salt = json.dumps(identity, sort_keys=True).encode()
        self._file.seek(0)
        header, end, dropped = self._file.readline(), self._file.tell(), 0
        for line in self._file:
            item = _decode(line, self._salt)
            if item is None:
                dropped += 1
            else:
                self.done[item["key"]] = end
            end += len(line)
        if not self.done and (_decode(header) or {}).get("identity") != identity:
            # no item of this identity: an empty journal, a kill while the first line was written, or --overwrite
            self._file.truncate(0)
            self._append({"identity": identity}, b"")
            return
        self._file.seek(-1, os.SEEK_END)
        if self._file.read(1) != b"\n":
            self._file.write(b"\n")  # close the line that the kill left open
        if dropped:
            print(f"{self.path}: {dropped} damaged lines are dropped and made again")

    def _append(self, item: dict[str, Any], salt: bytes) -> int:
        body = json.dumps(item, ensure_ascii=True, separators=(",", ":")).encode()
        self._file.seek(0, os.SEEK_END)
        offset = self._file.tell()
        try:
            self._file.write(_checksum(body, salt) + b" " + body + b"\n")
            self._file.flush()
        except OSError:
            # a full disk: what is still in the buffer would be written, and fail, once more when Python ends
            self._file.raw.close()
            raise
        return offset

    def add(self, key: str, value: dict[str, Any]) -> None:
        self.done[key] = self._append({"key": key, "value": value}, self._salt)

    def read(self, key: str) -> dict[str, Any]:
        self._file.seek(self.done[key])
        item = _decode(self._file.readline(), self._salt)
        if item is None:
            raise SPPOError(f"{self.path} changed while it was read; run the stage again")
        return item["value"]

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def remove(self) -> None:
        """Delete the journal: the shard exists under its final name, so nobody needs it."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def refuse_another(path: Path, identity: dict[str, Any], advice: str = "") -> None:
    """Raise OtherWorkError where a journal holds items of another identity. Names what differs; changes nothing.

    A damaged first line names no identity. Then the items tell: one that fits this identity is enough.
    """
    if not path.exists():
        return
    with open(path, "rb") as handle:
        header = _decode(handle.readline())
        items = (line for line in handle if line.endswith(b"\n"))  # a kill leaves the last one without its end
        first = next(items, b"")
        if not first or (header and header["identity"] == identity):
            return
        if header:
            found = differences(header["identity"], identity)
            about = f"{path} holds work made under other inputs or settings:"
            raise OtherWorkError("\n  ".join([about, *found]), advice)
        salt = json.dumps(identity, sort_keys=True).encode()
        if not any(_decode(line, salt) for line in (first, *items)):
            raise OtherWorkError(
                f"{path}: its first line is damaged, and none of its items was made under these inputs and settings. "
                "Run the command that it was made with, which keeps them.",
                advice,
            )


def identity_of(path: Path) -> dict[str, Any] | None:
    """The identity that a journal was begun with; None where there is no journal, or its first line is not whole."""
    if not path.exists():
        return None
    with open(path, "rb") as handle:
        return (_decode(handle.readline()) or {}).get("identity")


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What differs between two identities, a line each: its name, what is there, what is asked for now."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list({**old, **new})
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{where}.{k}" if where else k)]
    return [] if old == new else [f"{where}: {_short(old)} there, {_short(new)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _checksum(body: bytes, salt: bytes) -> bytes:
    return hashlib.sha256(salt + body).hexdigest()[:16].encode()


def _decode(line: bytes, salt: bytes = b"") -> dict[str, Any] | None:
    """A line's item; None for a damaged one and for another identity's. `salt`: empty for the first line."""
    checksum, _, body = line.rstrip(b"\n").partition(b" ")
    return json.loads(body) if _checksum(body, salt) == checksum else None

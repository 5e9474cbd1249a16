"""Files are whole or absent, journals survive a kill, and a stage refuses work made under other settings."""

from __future__ import annotations

import errno
import fcntl
import json
import subprocess
import threading
import time
from pathlib import Path

import pytest
import tiny

from sppo.command.errors import SPPOError
from sppo.models.files import model_identity
from sppo.store.files import atomic, exclusive
from sppo.store.journal import Journal
from sppo.store.locks import hold, machine
from sppo.store.manifest import Stage, await_written

IDENTITY = {"inputs": {"a": 1}, "settings": {}}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    child, killed = subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sleep", "60"])
    killed.kill()
    state = Path(f"/proc/{killed.pid}/stat")
    tiny.wait_until(lambda: not state.exists() or ") Z " in state.read_text())  # dead, but nobody has taken note
    # the first is beyond the largest process id
    gone, listed, alive = (tmp_path / f".x.tmp-{machine()}-{pid}" for pid in (2**22 + 1, killed.pid, child.pid))
    elsewhere = tmp_path / f".x.tmp-other-{2**22 + 1}"  # of a process of another machine, which may be at work
    for path in (gone, listed, alive, elsewhere):
        path.write_text("half")
    with atomic(tmp_path / "x") as temporary:
        temporary.write_text("whole")
    child.kill()
    child.wait()
    killed.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.name, elsewhere.name, "x"])


def test_a_file_that_another_machine_wrote_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared disk shows first nothing, then an older file of that name, then the one that the manifest means."""
    path, manifest = tmp_path / "x.parquet", tmp_path / "x.manifest.json"
    path.write_text("new")
    Stage("x", manifest, [path], {}, {}).finish({})
    assert await_written(path, manifest)
    path.write_text("old")
    assert await_written(path, manifest)  # on one machine there is nothing to wait for
    monkeypatch.setenv("SPPO_SHARED", "1")
    moments = [lambda: path.unlink(), lambda: path.write_text("older"), lambda: path.write_text("new")]
    for delay, moment in enumerate(moments):
        threading.Timer(delay * 0.7, moment).start()
    began = time.monotonic()
    assert await_written(path, manifest)
    assert time.monotonic() > began + 1.3


def test_a_disk_without_locks_has_an_owner_file_in_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS without a lock server, Lustre without flock: it said that another process was at work, of nobody."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    held, owner = hold(tmp_path / "j"), tmp_path / "j.owner"
    with pytest.raises(BlockingIOError):
        hold(tmp_path / "j")
    held.release()
    assert not owner.exists()
    dead = subprocess.Popen(["true"])
    dead.wait()
    owner.write_text(json.dumps({"machine": machine(), "pid": dead.pid}))  # killed: it gives way
    hold(tmp_path / "j").release()
    owner.write_text(json.dumps({"machine": "another", "pid": 1}))
    with pytest.raises(SPPOError, match=r"j\.owner: a process of another machine.*delete this file"):
        hold(tmp_path / "j")
    owner.unlink()
    with exclusive(tmp_path), pytest.raises(SPPOError, match="another process is at work in"), exclusive(tmp_path):
        pass
    assert not (tmp_path / ".lock.owner").exists()


def test_a_damaged_first_line_costs_no_item_and_mixes_no_identities(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", IDENTITY)
    journal.add("p", {"n": 1})
    journal.close()
    content = bytearray((tmp_path / "j").read_bytes())
    content[20] ^= 1
    (tmp_path / "j").write_bytes(content)
    again = Journal(tmp_path / "j", IDENTITY)
    assert again.read("p") == {"n": 1}
    again.close()
    kept = (tmp_path / "j").read_bytes()
    with pytest.raises(SPPOError, match="first line is damaged, and none of its items was made under these inputs"):
        Journal(tmp_path / "j", {"inputs": {"a": 2}, "settings": {}})
    assert (tmp_path / "j").read_bytes() == kept


def stage(directory: Path, **settings: int) -> Stage:
    return Stage("s", directory / "m.json", [directory / "out"], {"model": "abc"}, settings, directory / "j")


def test_a_stage_is_done_once_and_refuses_other_settings(tmp_path: Path) -> None:
    assert not stage(tmp_path, pairs=5).is_current()
    (tmp_path / "out").write_text("result")
    stage(tmp_path, pairs=5).finish({"n": 1})
    assert stage(tmp_path, pairs=5).is_current()
    assert not stage(tmp_path, pairs=4).is_current()
    with pytest.raises(SPPOError, match=r"settings\.pairs: 5 there, 4 now(.|\n)*--overwrite"):
        stage(tmp_path, pairs=4).refuse_foreign()
    (tmp_path / "out").write_text("changed")
    assert not stage(tmp_path, pairs=5).is_current()
    stage(tmp_path, pairs=5).refuse_foreign()  # its own, so it is made again
    (tmp_path / "out").unlink()
    assert not stage(tmp_path, pairs=5).is_current()


def test_somebody_elses_output_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SPPOError, match="without a manifest"):
        stage(tmp_path).refuse_foreign()
    assert (tmp_path / "out").read_text() == "mine"
    stage(tmp_path).discard()
    assert not (tmp_path / "out").exists()


def test_overwrite_goes_on_with_its_own_work_and_with_nobody_elses(tmp_path: Path) -> None:
    """A job with --overwrite that meets its time limit would else begin anew for ever."""
    (tmp_path / "out").write_text("another's")
    stage(tmp_path).discard()
    assert not (tmp_path / "out").exists()
    stage(tmp_path).begin()
    (tmp_path / "out").write_text("half")
    stage(tmp_path).discard()
    assert (tmp_path / "out").read_text() == "half"
    stage(tmp_path, pairs=4).discard()
    assert not (tmp_path / "out").exists()


def test_a_kill_between_output_and_manifest_is_no_dead_end(tmp_path: Path) -> None:
    """The stage makes it again; the same file under other settings is still somebody else's."""
    stage(tmp_path, pairs=5).begin()
    (tmp_path / "out").write_text("whole, but killed before the manifest")
    assert not stage(tmp_path, pairs=5).is_current()
    stage(tmp_path, pairs=5).refuse_foreign()
    with pytest.raises(SPPOError, match="without a manifest"):
        stage(tmp_path, pairs=4).refuse_foreign()
    stage(tmp_path, pairs=5).finish({})
    assert stage(tmp_path, pairs=5).is_current()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "out"]


def test_what_a_kill_behind_the_manifest_has_left_goes(tmp_path: Path) -> None:
    """A shard that is done, whose process died before it deleted its journal: seen on Ray when a node died."""
    journal = Journal(tmp_path / "j", stage(tmp_path, pairs=5).identity)
    journal.add("p", {})
    journal.close()
    (tmp_path / "out").write_text("result")
    stage(tmp_path, pairs=5).finish({})
    stage(tmp_path, pairs=5).begin()  # its mark too
    assert stage(tmp_path, pairs=5).is_current()
    stage(tmp_path, pairs=5).remove_leftovers()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "out"]


def test_a_journal_of_other_settings_is_refused_not_deleted(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", stage(tmp_path, pairs=5).identity)
    journal.add("p", {})
    journal.close()
    stage(tmp_path, pairs=5).refuse_foreign()
    with pytest.raises(SPPOError, match="pairs"):
        stage(tmp_path, pairs=4).refuse_foreign()
    assert (tmp_path / "j").exists()


def test_a_journal_without_work_refuses_nothing(tmp_path: Path) -> None:
    """A try that failed before its first prompt must not hold the next one, under mended settings, to its own."""
    Journal(tmp_path / "j", stage(tmp_path, pairs=5).identity).close()
    stage(tmp_path, pairs=4).refuse_foreign()


def test_new_weights_under_the_same_path_are_another_model(models: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(models / "llama3", tmp_path / "m")
    assert model_identity(copy) == model_identity(models / "llama3")
    (copy / "README.md").write_text("words")
    assert model_identity(copy) == model_identity(models / "llama3")
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_identity(copy) != model_identity(models / "llama3")

"""Outputs: what is deleted, links, locks, and whether every file that is read later is what was written."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_server
import preferences
import pytest
import tiny
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from preferences import data_directory
from safetensors.torch import load_file, save_file

from sppo import run_sppo
from sppo.command.errors import SPPOError, UsageError
from sppo.hub.push import _model_files, push_model
from sppo.launch import script as launch
from sppo.launch.devices import CPU
from sppo.models.files import model_identity, tokenizer_files
from sppo.models.policy import Policy, open_policy
from sppo.pairing.training_set import compute_prob
from sppo.preflight.facts import Iteration, Run
from sppo.preflight.machine import check_outputs
from sppo.rankers.pinning import pinned
from sppo.recipe import Recipe
from sppo.schema import content_id
from sppo.store import directories, locks, manifest
from sppo.store.directories import (
    appearing,
    clear,
    delete,
    refuse_busy,
    sweep,
    target_of,
    unknown_files,
    work_of,
    working,
)
from sppo.store.files import atomic, digest, exclusive, read_json, write_json
from sppo.store.locks import Held, alone, hold
from sppo.store.manifest import MANIFEST, Stage
from sppo.training.average import average
from sppo.training.settings import Training


@pytest.fixture(autouse=True)
def like_nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS a deleted file that is still open stays in its directory, under another name, so that this cannot go."""
    real = os.rmdir

    def rmdir(path: Any, *, dir_fd: int | None = None) -> None:
        for handle in Path("/proc/self/fd").iterdir():
            if os.path.lexists(handle) and f"/{os.path.basename(path)}/sppo.work (deleted)" in os.readlink(handle):
                raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", rmdir)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = read_json(path)
    change(content)
    write_json(path, content)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preferences.write(tmp_path_factory.mktemp("data"), preferences.rows(4))


def train(models: Path, data: Path, output_dir: Path, *flags: str, model: Path | None = None) -> Path:
    """run_sppo.py's main, in this process."""
    words = [f"--model={model or models / 'llama3'}", f"--dataset={data}", f"--output_dir={output_dir}", *flags]
    run_sppo.main([*preferences.SMALL, *words])
    return output_dir


@pytest.fixture(scope="module")
def trained(models: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model; tests work on copies of it."""
    return train(models, data, tmp_path_factory.mktemp("trained") / "model")


def test_a_directory_with_other_files_is_refused_and_nothing_in_it_is_touched(
    models: Path, data: Path, trained: Path, tmp_path: Path
) -> None:
    """It was deleted, without --overwrite: a thesis, or with the run's own directory the whole run."""
    run = tmp_path / "run"
    two = [str(shutil.copytree(trained, run / f"iter{i}" / "model")) for i in (1, 2)]
    (tmp_path / "thesis" / "chapters").mkdir(parents=True)
    (tmp_path / "thesis" / "chapters" / "one.tex").write_text("years of work")
    before = tiny.contents(tmp_path)
    refusals: list[tuple[Path, type[SPPOError], str]] = [
        (tmp_path / "thesis", SPPOError, "did not make: chapters/one.tex"),
        (run, UsageError, "holds .*, a model that is read"),
        (run / "iter1", UsageError, "holds .*, a model that is read"),
        (run / "iter1" / "model", UsageError, "is .*, a model that is read"),
        (run / "iter1" / "model" / "mean", UsageError, "is in .*, a model that is read"),
        (tmp_path, UsageError, "holds .*, a model that is read"),
        (Path(), UsageError, "is the current directory"),
        (Path(".."), UsageError, "a directory above the current one"),
        (Path("/"), UsageError, "holds .*, a model that is read"),
    ]
    for where, kind, said in refusals:
        for overwrite in (False, True):
            with pytest.raises(kind, match=said):
                average(two, where, overwrite)
            with pytest.raises(SPPOError, match=r"did not make|a model that is read|the current|have no config"):
                train(models, data, where, *["--overwrite"] * overwrite, model=run / "iter1" / "model")
            assert tiny.contents(tmp_path) == before
    other = shutil.copytree(trained, tmp_path / "other")
    with pytest.raises(SPPOError, match="the work of another stage, train"):
        average(two, other, overwrite=True)
    assert tiny.contents(other) == tiny.contents(trained)


def test_a_file_that_came_into_a_finished_model_is_not_lost(
    models: Path, data: Path, trained: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(trained, tmp_path / "model")
    (model / "notes").mkdir()
    (model / "notes" / "mine.txt").write_text("mine")
    train(models, data, model)  # it is done, and stays so
    before = tiny.contents(tmp_path)
    with pytest.raises(SPPOError, match="did not make: notes/mine.txt"):
        train(models, data, model, "--overwrite", "--beta=0.5")
    assert tiny.contents(tmp_path) == before
    shutil.rmtree(model / "notes")
    train(models, data, model, "--overwrite", "--beta=0.5")
    assert read_json(model / "sppo_manifest.json")["settings"]["beta"] == 0.5
    assert not work_of(model).exists()


def test_a_models_manifest_knows_every_file_and_no_other_is_pushed(trained: Path, tmp_path: Path) -> None:
    written = read_json(trained / "sppo_manifest.json")
    names = set(tiny.contents(trained)) - {"sppo_manifest.json"}
    assert {*written["outputs"], *written["others"]} == names
    assert {"chat_template.jinja", "tokenizer.json", "model.safetensors"} <= set(written["outputs"])
    assert all(digest(trained / n) == sha for n, sha in {**written["outputs"], **written["others"]}.items())
    copy = shutil.copytree(trained, tmp_path / "copy")
    assert not unknown_files(copy)
    for name in ("my_eval.py", "merged/notes.txt", "results.csv", "a/config.json", "hf_token.txt"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("mine")
    (copy / "link").symlink_to(trained)
    expected = ["a/config.json", "hf_token.txt", "link", "merged/notes.txt", "my_eval.py", "results.csv"]
    assert unknown_files(copy) == expected
    assert set(_model_files(copy, read_json(copy / "sppo_manifest.json"))) == {*names, "sppo_manifest.json"}


def test_only_what_carries_our_marker_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for remove in (clear, delete):
        with pytest.raises(SPPOError, match="no work directory of this project"):
            remove(tmp_path / "mine")
    work_of(tmp_path / "x").mkdir()
    (work_of(tmp_path / "x") / "notes.txt").write_text("mine")
    with pytest.raises(SPPOError, match=r"it carries no mark of this project.*: notes.txt"), appearing(tmp_path / "x"):
        pytest.fail("it was begun")
    assert tiny.contents(tmp_path) == {"x.partial/notes.txt": b"mine"}
    (work_of(tmp_path / "x") / "notes.txt").unlink()
    with appearing(tmp_path / "x") as final:
        (final / "made").write_text("1")
    assert tiny.contents(tmp_path) == {"x/made": b"1"}
    with pytest.raises(ZeroDivisionError), working(tmp_path / "y"):
        raise ZeroDivisionError
    assert not work_of(tmp_path / "y").exists()  # nothing was done, so nothing stays
    (tmp_path / ".y.probe").mkdir()  # a kill has left it
    (tmp_path / ".y.probe" / "file").touch()
    with working(tmp_path / "y"):
        pass
    assert tiny.contents(tmp_path) == {"x/made": b"1"}


def test_through_a_link_the_work_and_the_model_are_on_the_targets_disk(
    models: Path, data: Path, tmp_path: Path
) -> None:
    """A training ended with "Cannot call rmtree on a symbolic link", hours in, each time."""
    (tmp_path / "big").mkdir()
    for there in ("absent", "empty"):
        link = tmp_path / f"to-{there}"
        link.symlink_to(tmp_path / "big" / there)
    (tmp_path / "big" / "empty").mkdir()
    train(models, data, tmp_path / "to-absent", "--save_steps=1")
    assert (tmp_path / "to-absent").is_symlink()
    assert (tmp_path / "big" / "absent" / "model.safetensors").is_file()
    average([str(models / "llama3"), str(tmp_path / "to-absent")], tmp_path / "to-empty")
    assert (tmp_path / "to-empty").is_symlink()
    mean = load_file(tmp_path / "big" / "empty" / "model.safetensors")
    one, two = (load_file(d / "model.safetensors") for d in (models / "llama3", tmp_path / "to-absent"))
    assert all(mean[k].allclose((one[k] + two[k]) / 2) for k in mean)
    assert sorted(p.name for p in tmp_path.rglob("*.partial")) == []
    (tmp_path / "nowhere").symlink_to(tmp_path / "unmounted" / "model")
    with pytest.raises(SPPOError, match="is a link to .*, which cannot be made there"):
        target_of(tmp_path / "nowhere")
    (tmp_path / "file").symlink_to(tmp_path / "big" / "kept.json")
    with atomic(tmp_path / "file") as temporary:
        temporary.write_text("{}")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "big" / "kept.json").read_text() == "{}"


def test_an_end_that_cannot_be_written_is_said_before_the_work(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sppo.training.train.make_trainer", lambda _: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "closed").mkdir()
    real, renamed, mounted = os.access, os.rename, directories._is_mounted
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p).name != "closed" and real(p, mode))
    monkeypatch.setattr(directories, "_is_mounted", lambda p: p.name == "mounted" or mounted(p))

    def rename(a: Path, b: Path) -> None:
        """A bucket that is mounted as a disk, and knows no renaming of directories with files in them."""
        if "bucket" in str(a) and any(Path(a).iterdir()):
            raise OSError(38, "Function not implemented")
        renamed(a, b)

    monkeypatch.setattr(os, "rename", rename)
    for name, said in (
        ("file", "a file stands where a directory should be"),
        ("file/model", "a file stands where a directory should be"),
        ("closed/model", "closed cannot be written to"),
        ("mounted", "is a mount point"),
        ("bucket/model", "a directory cannot be renamed in .*bucket"),
    ):
        with pytest.raises(SPPOError, match=said):
            train(models, data, tmp_path / name)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["file"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_mount_point_is_known(tmp_path: Path) -> None:
    """A directory that is bound from the same disk, too, as containers do it."""
    (tmp_path / "a b").mkdir()
    (tmp_path / "from").mkdir()
    if subprocess.run(["mount", "--bind", tmp_path / "from", tmp_path / "a b"], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        with pytest.raises(SPPOError, match="is a mount point"), working(tmp_path / "a b"):
            pass
    finally:
        subprocess.run(["umount", tmp_path / "a b"], check=True)
    with working(tmp_path / "a b"):
        pass


def test_the_preflight_says_what_could_not_be_written(tmp_path: Path, trained: Path) -> None:
    run = tmp_path / "run"
    (run / "iter1").mkdir(parents=True)
    asked = Run(Recipe(run_dir=str(run)), [CPU], [Iteration(1, True, True, True)])
    assert list(check_outputs(asked)) == []
    (run / "iter1" / "model").symlink_to(shutil.copytree(trained, tmp_path / "elsewhere"))
    (run / "report.html").mkdir()
    (found,) = check_outputs(asked)
    assert found.text == f"{run / 'report.html'}: a directory stands where a file is to be written; move it away"
    (tmp_path / "elsewhere" / "notes.txt").write_text("mine")
    with pytest.raises(SPPOError, match="did not make: notes.txt"):
        list(check_outputs(asked))
    shutil.rmtree(tmp_path / "elsewhere")
    (run / "iter1" / "data").symlink_to(tmp_path / "unmounted")
    with pytest.raises(SPPOError, match="data is a link that leads nowhere"):
        list(check_outputs(asked))


def stage(directory: Path, **settings: int) -> Stage:
    return Stage("s", directory / "m.json", [directory / "out"], {"model": "abc"}, settings, directory / "j")


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


HOLD = """
import sys, time
from pathlib import Path
from sppo.store.directories import working
from sppo.store.manifest import MANIFEST, Stage

here = Path(sys.argv[1])
held = Stage("s", here / "m.json", [here / "out"], {"model": "abc"}, {"pairs": 5}, here / "j")
held.refuse_foreign()
held.begin()
with working(here / "model") as work:
    (work / "half").touch()
    print("at work", flush=True)
    time.sleep(600)
"""


def test_two_processes_cannot_write_the_same_and_a_kill_leaves_no_lock(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=tiny.ROOT, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"at work\n"
    before = tiny.contents(tmp_path)
    mine = stage(tmp_path, pairs=5)
    with pytest.raises(SPPOError, match="another process is making .*out; wait for it or stop it"):
        mine.begin()
    with pytest.raises(SPPOError, match="another process is making"):  # it would delete what the other one writes
        stage(tmp_path, pairs=4).discard()
    for attempt in (lambda: refuse_busy(tmp_path / "model"), working(tmp_path / "model").__enter__):
        with pytest.raises(SPPOError, match="another process is making .*model; wait for it or stop it"):
            attempt()
    sweep(tmp_path / "model")
    assert tiny.contents(tmp_path) == before
    other.kill()
    other.wait()
    refuse_busy(tmp_path / "model")
    mine.begin()
    (tmp_path / "out").write_text("mine")
    mine.finish({})
    with appearing(tmp_path / "model") as final:
        (final / "whole").touch()
    assert stage(tmp_path, pairs=5).is_current()
    assert sorted(tiny.contents(tmp_path)) == ["m.json", "model/whole", "out"]


def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_no_lock(tmp_path: Path) -> None:
    """A process that waits has the file open; the one before it deletes it as it ends."""
    first = hold(tmp_path / "lock")
    waiting = threading.Thread(target=lambda: got.append(hold(tmp_path / "lock", patience=30)))
    got: list[Held] = []
    waiting.start()
    time.sleep(0.1)
    (tmp_path / "lock").unlink()
    first.release()
    waiting.join()
    with pytest.raises(BlockingIOError):
        hold(tmp_path / "lock")
    got[0].release()


def test_on_a_cluster_a_lock_of_a_dead_machine_is_waited_for_and_on_one_machine_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server keeps it for some 90 seconds; a job that Slurm starts again meets it at each of these."""

    def begun() -> None:
        held = stage(tmp_path, pairs=5)
        held.begin()
        (tmp_path / "out").touch()
        held.finish({})

    places: dict[str, Callable[[], Any]] = {
        ".lock": exclusive(tmp_path).__enter__,
        "launch.lock": alone(tmp_path / "launch.lock", "is at work").__enter__,
        "m.json.started": begun,
        "model.partial/sppo.work": lambda: refuse_busy(tmp_path / "model"),
        "another.partial/sppo.work": working(tmp_path / "another").__enter__,
    }
    dead = {name: hold(tmp_path / name) for name in places}
    began = time.monotonic()
    with pytest.raises(SPPOError, match="another process is at work in"), exclusive(tmp_path):
        pass
    for name in ("m.json.started", "model.partial/sppo.work"):
        with pytest.raises(SPPOError, match="another process is"):
            places[name]()
    assert time.monotonic() - began < 1
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert locks.usual_patience() == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert locks.usual_patience() == 120
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv(locks.SHARED, "1")
    waiting = [threading.Thread(target=place) for place in places.values()]
    for each in waiting:
        each.start()
    time.sleep(0.3)
    assert all(each.is_alive() for each in waiting)
    for name in places:
        dead[name].release()
    for each in waiting:
        each.join(30)
        assert not each.is_alive()


def test_a_lock_whose_directory_goes_while_it_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two looks at it another process may end, and take it along."""
    real, left = Path.mkdir, iter([1])

    def mkdir(path: Path, *args: Any, **more: Any) -> None:
        real(path, *args, **more)
        if path.name.endswith(".partial") and next(left, 0):
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with working(tmp_path / "model") as work:
        (work / "half").touch()
    assert not next(left, 0)
    owner = tmp_path / "lock.owner"
    monkeypatch.setattr(fcntl, "flock", no_locks)
    for half in ("", '{"machine": "'):
        owner.write_text(half)
        with pytest.raises(BlockingIOError):
            hold(tmp_path / "lock")
    owner.write_text('{"machine": "another", "pid": 1}')
    with pytest.raises(SPPOError, match=r"if that machine is gone, delete this file"):
        hold(tmp_path / "lock")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "gone")
    with pytest.raises(OSError, match="nowhere"):
        hold(tmp_path / "nowhere" / "lock")


def test_who_stands_in_a_finished_model_is_told_that_it_is_done(
    models: Path, data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Nothing would be replaced. The mean of models is made where nothing stands yet."""
    model = shutil.copytree(trained, tmp_path / "model")
    for name in (".nfs0000000012345678", ".DS_Store", "Thumbs.db"):
        (model / name).touch()
    two = [str(shutil.copytree(models / "llama3", tmp_path / name)) for name in "ab"]
    average(two, tmp_path / "mean")
    before = tiny.contents(tmp_path)
    small = [word.replace("recipes/", f"{tiny.ROOT}/recipes/") for word in preferences.SMALL]
    monkeypatch.setattr(preferences, "SMALL", small)
    monkeypatch.chdir(tmp_path / "mean")
    average(two, Path())
    assert "average: done: " in capsys.readouterr().out
    monkeypatch.chdir(model)
    train(models, data, Path())
    assert "train: done: " in capsys.readouterr().out
    with pytest.raises(UsageError, match="is the current directory"):
        train(models, data, Path(), "--beta=0.5", "--overwrite")
    assert tiny.contents(tmp_path) == before
    monkeypatch.chdir(tiny.ROOT)
    train(models, data, model, "--beta=0.5", "--overwrite")
    assert (model / "sppo_manifest.json").read_bytes() != before["model/sppo_manifest.json"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_directory_that_a_container_image_holds_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """overlayfs cannot rename it, which was seen after all the work."""
    with appearing(tmp_path / "model") as final:
        (final / "merged").mkdir()
        for name in ("old", "merged/old", MANIFEST):
            (final / name).touch()
    Stage("s", tmp_path / "model" / MANIFEST, [tmp_path / "model/old", tmp_path / "model/merged/old"], {}, {}).finish(
        {}
    )
    rename, remove, gone = os.rename, directories._remove, []

    def of_overlayfs(source: Any, target: Any) -> None:
        if Path(source) == tmp_path / "model":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", of_overlayfs)
    monkeypatch.setattr(directories, "_remove", lambda path: (gone.append(path), remove(path)))
    with appearing(tmp_path / "model") as final:
        (final / "new").write_text("whole")
        gone.clear()
    assert tiny.contents(tmp_path) == {"model/new": b"whole"}
    assert gone.index(tmp_path / "model") == 2  # the manifest goes with it


def test_what_is_done_on_a_read_only_disk_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between manifest and end left a marker there; and the launcher locked shards that nobody can make."""
    done = stage(tmp_path / "data", pairs=5)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "out").touch()
    done.finish({})
    (tmp_path / "data" / "m.json.started").touch()

    def read_only(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(manifest, "hold", read_only)
    monkeypatch.setattr(locks, "hold", read_only)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert stage(tmp_path / "data", pairs=5).is_current()
    stage(tmp_path / "data", pairs=5).remove_leftovers()
    started: list[Any] = []
    monkeypatch.setattr(launch, "run_shards", lambda *words: started.append(words[-1]))
    words = ["--gpus=none", f"--output_dir={tmp_path / 'data'}", f"--logs={tmp_path / 'logs'}"]
    (tmp_path / "data" / "responses").mkdir()
    launch.launch(["scripts/generate.py", *words], "")
    assert started == [[sys.executable, str(tiny.ROOT / "scripts/generate.py"), *words]]


def test_an_empty_work_directory_that_a_kill_left_goes(tmp_path: Path) -> None:
    """The driver took it for a half model at every start."""
    work_of(tmp_path / "model").mkdir()
    sweep(tmp_path / "model")
    assert not work_of(tmp_path / "model").exists()
    work_of(tmp_path / "model").mkdir()
    (work_of(tmp_path / "model") / "notes").touch()
    sweep(tmp_path / "model")
    assert tiny.contents(tmp_path) == {"model.partial/notes": b""}


def test_what_another_process_made_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    late = stage(tmp_path, pairs=4)
    late.refuse_foreign()
    quick = stage(tmp_path, pairs=5)
    quick.begin()
    (tmp_path / "out").write_text("of five")
    quick.finish({})
    with pytest.raises(SPPOError, match=r"settings\.pairs: 5 there, 4 now"):
        late.begin()
    assert (tmp_path / "out").read_text() == "of five"


def test_what_another_process_has_trained_meanwhile_is_done(
    models: Path, data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(trained, tmp_path / "model")
    before = tiny.contents(tmp_path)
    monkeypatch.setattr(Training, "is_done", lambda _: False)  # it ends after this one has looked
    train(models, data, tmp_path / "model")
    assert f"train: done: {tmp_path / 'model'}" in capsys.readouterr().out
    assert tiny.contents(tmp_path) == before
    words = [f"--model={models / 'llama3'}", f"--dataset={data}", f"--output_dir={tmp_path / 'model'}"]
    ranks = preferences.asked([*words, "--batch_size=1"], 2)
    ranks.stage = preferences.asked(words, 1).stage
    with pytest.raises(SPPOError, match="was made by another process meanwhile"), ranks.at_work():
        pass  # the other ranks would wait for this one


def test_where_a_disk_has_no_locks_an_owner_file_stands_for_one_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
    held = stage(tmp_path, pairs=5)
    held.begin()
    with pytest.raises(SPPOError, match="another process is making"):
        stage(tmp_path, pairs=5).begin()
    (tmp_path / "out").touch()
    held.finish({})
    with appearing(tmp_path / "model") as final:
        (final / "whole").touch()
        with pytest.raises(SPPOError, match="another process is making"):
            refuse_busy(tmp_path / "model")
    assert sorted(tiny.contents(tmp_path)) == ["m.json", "model/whole", "out"]


@pytest.mark.slow
def test_the_same_pipeline_twice_is_refused_and_the_first_ends_undisturbed(
    models: Path, data: Path, tmp_path: Path
) -> None:
    """Both trained in one directory, destroyed each other's checkpoints, and the survivor's metrics missed steps."""
    flags = [f"--model={models / 'llama3'}", f"--dataset={data}", "--save_steps=4", "--num_train_epochs=10"]
    whole = train(models, data, tmp_path / "whole", *flags[2:])
    words = ["scripts/pipeline.sh", *preferences.SMALL, *flags, "--gpus=none", "--accelerate_config=cpu"]
    words += ["--output_dir", tmp_path / "model"]
    first = tiny.start("bash", *words, slow=tmp_path / "nothing", log=tmp_path / "log")
    tiny.wait_for(first, lambda: (tmp_path / "model.partial" / "identity.json").exists())
    at_work = list(tiny.processes(tmp_path / "model"))  # training is its own session
    for pid in at_work:
        os.kill(pid, signal.SIGSTOP)  # so that it is at work for as long as the second one takes
    second = tiny.run(*words)
    for pid in at_work:
        os.kill(pid, signal.SIGCONT)
    assert first.poll() is None, (tmp_path / "log").read_text()
    assert second.returncode == 1
    assert f"another process is making {tmp_path / 'model'}; wait for it or stop it" in second.stderr
    assert len(list((tmp_path / "logs").glob("train*.log"))) == 1  # the second has not begun to train
    assert first.wait(600) == 0, (tmp_path / "log").read_text()
    steps = [[line["step"] for line in preferences.metrics(model)] for model in (whole, tmp_path / "model")]
    assert steps[0] == steps[1]
    one, two = (load_file(model / "model.safetensors") for model in (whole, tmp_path / "model"))
    assert all(one[name].equal(two[name]) for name in one)
    assert not work_of(tmp_path / "model").exists()


FURTHER = {
    "additional_chat_templates/tool_use.jinja": "{{ messages[0]['content'] }}",
    "sentencepiece.bpe.model": "pieces",
    "qwen.tiktoken": "IQ== 0",
    "tokenizer.model.v3": "newer pieces",
    "prophetnet.tokenizer": "words",
    "vocab-src.json": "{}",
    "preprocessor_config.json": "{}",
    "word-pieces.xyz": "named in tokenizer_config.json",
}
# of other kinds, or other tools': none of it belongs to the tokenizer
NOT_COPIED = (
    "vocab.pkl pytorch_model.bin evil.py model.onnx LICENSE notes.md .gitattributes quantize_config.json params.json "
    "original/consolidated.00.pth original/tokenizer.model checkpoint-5/trainer_state.json results.csv hf_token.txt "
    "private_prompts.json nohup.out config.json~ .tokenizer.model"
).split()


def furnished(model: Path, target: Path, further: dict[str, str]) -> Path:
    """A copy of a model with more files."""
    shutil.copytree(model, target)
    for name, content in further.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(content)
    if "word-pieces.xyz" in further:
        edit(target / "tokenizer_config.json", lambda config: config.update(vocab_file="word-pieces.xyz"))
    return target


def test_a_tokenizers_further_files_go_from_iteration_to_iteration(models: Path, data: Path, tmp_path: Path) -> None:
    """average.py refused the run's own model, whose tokenizer had lost its further templates."""
    base = furnished(models / "llama3", tmp_path / "base", FURTHER | dict.fromkeys(NOT_COPIED, "{}"))
    one = train(models, data, tmp_path / "one", model=base)
    adapter = train(models, data, tmp_path / "adapter", "--use_peft=true", "--merge_adapter=true", model=one)
    average([str(base), str(one)], tmp_path / "mean")
    for made in (one, adapter, adapter / "merged", tmp_path / "mean"):
        for name in [*FURTHER, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]:
            assert (made / name).read_bytes() == (base / name).read_bytes(), (made, name)
        assert not [name for name in NOT_COPIED if (made / name).exists()]
        assert "tool_use" in open_policy(str(made)).tokenizer().chat_template
    written = read_json(adapter / "sppo_manifest.json")["outputs"]
    assert {*FURTHER, *(f"merged/{name}" for name in FURTHER)} <= set(written)


def test_every_name_that_transformers_gives_to_a_vocabulary_is_known(tmp_path: Path) -> None:
    here = Path(importlib.util.find_spec("transformers").submodule_search_locations[0])
    sources = [path.read_text(encoding="utf-8") for path in here.glob("models/*/tokenization_*.py")]
    lists = re.findall(r"VOCAB_FILES_NAMES = (\{.*?\})", "".join(sources), re.DOTALL)
    names = {name for given in lists for name in re.findall(r'"([\w.-]+\.\w+)"', given)}
    assert {"merges.txt", "spiece.model", "source.spm", "bpe.codes", "prophetnet.tokenizer"} <= names
    for name in names:
        (tmp_path / name).write_text("{}")
    assert set(tokenizer_files(tmp_path)) == names


def test_a_model_of_ours_from_the_hub_is_without_what_is_not_fetched(trained: Path, tmp_path: Path) -> None:
    """Its manifest knows the code that came with it, which is fetched only with --trust_remote_code."""
    shutil.copytree(trained, tmp_path / "model")
    before = open_policy(str(trained)).identity()
    edit(tmp_path / "model" / MANIFEST, lambda made: made["outputs"].update({"modeling_own.py": "0" * 64}))
    assert open_policy(str(tmp_path / "model")).identity() == before
    with pytest.raises(SPPOError, match="modeling_own.py changed since it was written, or is gone"):
        open_policy(str(tmp_path / "model"), remote_code=True).identity()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(SPPOError, match="config.json changed since it was written"):
        open_policy(str(tmp_path / "model")).identity()


def test_what_decides_the_tokens_is_in_the_identity_and_older_identities_stay(models: Path, tmp_path: Path) -> None:
    def older(path: Path) -> str:
        """The identity as it was before further files counted."""
        found = {
            f for pattern in ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt") for f in path.glob(pattern)
        }
        return hashlib.sha256("".join(f"{f.name}:{digest(f)}\n" for f in sorted(found)).encode()).hexdigest()

    plain = furnished(models / "llama3", tmp_path / "plain", {"merges.txt": "a b", "spm.model": "p"})
    assert model_identity(plain) == older(plain)
    for name in NOT_COPIED:
        (plain / name).parent.mkdir(exist_ok=True)
        (plain / name).write_text("")
    assert model_identity(plain) == older(plain)  # of stray files those count that always have: .json and .txt
    seen = {older(plain)}
    for name in ("qwen.tiktoken", "additional_chat_templates/tool_use.jinja"):
        for content in ("one", "two"):
            (plain / name).parent.mkdir(exist_ok=True)
            (plain / name).write_text(content)
            assert model_identity(plain) not in seen
            seen.add(model_identity(plain))


def test_a_flipped_bit_in_any_file_of_a_model_is_noticed(trained: Path, tmp_path: Path) -> None:
    for name in read_json(trained / "sppo_manifest.json")["outputs"]:
        model = shutil.copytree(trained, tmp_path / name)
        assert open_policy(str(model)).identity() == open_policy(str(trained)).identity()
        tiny.flip(model / name, 0.5)
        with pytest.raises(SPPOError, match=rf"model .*: {re.escape(name)} changed since it was written"):
            Policy(model, None, model).identity()
        with pytest.raises(SPPOError, match=rf"{re.escape(name)} changed since .*, so nothing was pushed"):
            push_model(model, "me", "x", public=False)
    (model / "sppo_manifest.json").unlink()  # another tool's directory, or a copy that somebody wants to change
    Policy(model, None, model).identity()


def test_a_changed_template_is_copied_again_before_anything_is_drawn_with_it(
    models: Path, data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each prompt of iteration 2 ended in "tssistant". To train again for it would cost hours, and an edit is kept."""
    model = shutil.copytree(trained, tmp_path / "model")
    before, template = tiny.contents(model), model / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "tssistant"))
    words = [f"--model={models / 'llama3'}", f"--dataset={data}", f"--output_dir={model}"]
    asked = preferences.asked(words, 1)
    assert not asked.stage.is_current()  # so the driver does not go on to iteration 2, but to this:
    (model / "tokenizer.json").unlink()
    train(models, data, model)
    said = capsys.readouterr().out
    assert "chat_template.jinja had changed since it was written, and is kept as" in said
    assert "tokenizer.json was gone. It is copied again from" in said
    assert f"train: done: {model}" in said
    assert tiny.contents(model) == before
    assert "tssistant" in (tmp_path / "model.changed-chat_template.jinja").read_text()
    assert asked.stage.is_current()


def test_a_flipped_bit_in_the_references_table_is_not_trained_on(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first loss was 30.8 for 6.8."""
    data = preferences.write(tmp_path / "data", preferences.rows(4))
    right = preferences.metrics(train(models, data, tmp_path / "right"))[0]["loss"]
    (table,) = (data / "reference").glob("*.safetensors")
    content = bytearray(table.read_bytes())
    content[-1] ^= 2  # of the last number's exponent
    table.write_bytes(content)
    found = preferences.metrics(train(models, data, tmp_path / "found"))[0]["loss"]
    assert "is damaged (it changed since it was written); it is not used" in capsys.readouterr().out
    assert found == right
    assert load_file(table)["logps"].isfinite().all()
    without = {"logps": load_file(table)["logps"]}
    save_file(without, table)  # an older version's, which says nothing of itself
    train(models, data, tmp_path / "older")
    assert "found the reference's log-probs in" in capsys.readouterr().out


def test_changed_responses_rankings_and_pins_are_refused(tmp_path: Path) -> None:
    """By hand, that is: a driver makes what changed again before it is read."""
    out = data_directory(tmp_path / "data", [["one", "two", "three"]] * 3)
    (ranking,) = (out / "ranking").glob("*.parquet")
    Stage("combine", out / "responses.manifest.json", [out / "responses.parquet"], {}, {}).finish({})
    inputs = {"responses": digest(out / "responses.parquet")}
    Stage("rank", ranking.with_suffix(".manifest.json"), [ranking], inputs, {}).finish({})
    compute_prob(Recipe(pairs=3, test_size=0), out, overwrite=False)
    for path, said in ((ranking, "Run rank.py again"), (out / "responses.parquet", "Run combine_generate.py again")):
        tiny.flip(path, 0.5)
        with pytest.raises(SPPOError, match=f"{path.name} is not what was written.* {said}"):
            compute_prob(Recipe(pairs=3, test_size=0), out, overwrite=True)
    pin = {"ranker": "org/ranker", "asked": "", "revision": "ab" * 20}
    recipe = Recipe(ranker="org/ranker")
    for more, is_whole in (({}, False), ({"check": content_id(pin)}, True), ({"check": "0"}, False)):
        write_json(out / "ranker.json", pin | more)
        if is_whole:
            assert pinned(recipe, out).ranker_revision == "ab" * 20
        else:
            with pytest.raises(SPPOError, match=r"ranker.json is damaged"):
                pinned(recipe, out)


def test_a_mean_of_models_is_pushed_without_local_paths(
    models: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended with KeyError: 'model'."""
    run = tmp_path / "my-run"
    one, two = (shutil.copytree(trained, run / f"iter{i}" / "model") for i in (1, 2))
    average([str(one), str(two), str(models / "llama3")], run / "mean")
    with hub_server.running() as hub:
        for key, value in hub.env.items():
            monkeypatch.setenv(key, value)
        for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        push_model(run / "mean", "me", "mean", public=False)
        files = hub.repos["me/mean"].files
        close_session()
    assert json.loads(files["sppo_manifest.json"])["models"] == ["model", "model", "llama3"]
    assert set(files) == set(tiny.contents(run / "mean"))
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]


def test_every_recursive_delete_asks_the_one_place() -> None:
    for path in [*(tiny.ROOT / "sppo").rglob("*.py"), *(tiny.ROOT / "scripts").glob("*.py")]:
        if path.name != "directories.py":
            assert "rmtree" not in path.read_text(), path


def test_an_edited_output_is_kept_before_it_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A driver makes an edited train.parquet again; the edit is somebody's work."""
    stage = Stage("made", tmp_path / "x.manifest.json", [tmp_path / "x.txt"], {}, {})
    stage.begin()
    stage.outputs[0].write_text("made")
    stage.finish({})
    stage.outputs[0].write_text("edited")
    again = Stage("made", tmp_path / "x.manifest.json", [tmp_path / "x.txt"], {}, {})
    assert not again.is_current()
    again.refuse_foreign()
    again.begin()
    assert "is kept as" in capsys.readouterr().out
    assert (tmp_path / "x.txt.changed").read_text() == "edited"
    again.outputs[0].write_text("made")
    again.finish({})
    assert again.is_current()

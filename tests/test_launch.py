"""One process a GPU: devices as they are named, the first failure stops the rest, nothing is left behind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from sppo.command import memory
from sppo.command.errors import SPPOError, UsageError
from sppo.iterations import digest_of_recipes
from sppo.launch import cores, machine, nodes
from sppo.launch.devices import devices, groups
from sppo.launch.logs import last_lines, progress_line, show_failure
from sppo.launch.watch import run_shards


def test_devices_are_taken_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    for standing, expected in {
        "2,0": ["2", "0"],
        "GPU-6b9f,MIG-1/2/3": ["GPU-6b9f", "MIG-1/2/3"],
        "": [""],
        "-1": [""],
    }.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", standing)
        assert devices("auto") == expected
    assert devices("0,2,5") == ["0", "2", "5"]
    assert devices("none") == [""]
    assert devices("none,none") == ["", ""]
    for wrong in ("0,", "0,none", "1,1"):
        with pytest.raises(UsageError):
            devices(wrong)
    assert groups(["0", "1", "2", "3"], 2) == ["0,1", "2,3"]
    with pytest.raises(UsageError, match="does not divide"):
        groups(["0", "1", "2"], 2)


def test_shards_on_one_cpu_share_its_cores(tmp_path: Path) -> None:
    """Threads that wait in a loop on each other's cores made two shards ten times slower."""
    show = "import os; print('mine:', *sorted(os.sched_getaffinity(0)), os.environ.get('OMP_NUM_THREADS'))"
    command = [
        sys.executable,
        "tests/shards.py",
        "--gpus=none,none",
        f"--logs={tmp_path}",
        "--stage=x",
        "--",
    ]
    tiny.succeed(*command, sys.executable, "-c", show)
    logs = [(tmp_path / f"x-{i}.1.log").read_text() for i in range(2)]
    (one, threads), (two, _) = [line.split("mine: ")[1].rsplit(maxsplit=1) for line in logs]
    every = sorted(os.sched_getaffinity(0))
    if len(every) > 1:
        assert not set(one.split()) & set(two.split())
        assert sorted(map(int, [*one.split(), *two.split()])) == every
    assert int(threads) == max(1, len(every) // 2)
    assert [cores.own(i, 2 * len(every)) for i in range(3)] == [every] * 3  # more shards than cores: no better way


@pytest.mark.parametrize(
    ("groups_of_process", "limits", "least"),
    [
        ("0::/", {"memory.max": "7"}, 7),  # in a container
        ("0::/", {"memory.max": "max"}, None),
        ("0::/slurm/job_1/step_0", {"slurm/job_1/memory.max": "5", "slurm/job_1/step_0/memory.max": "max"}, 5),
        ("1:cpu:/a\n4:cpuset,memory:/job_1", {"memory/job_1/memory.limit_in_bytes": "5"}, 5),
        ("4:memory:/docker/of/the/host\n0::/", {"memory/memory.limit_in_bytes": "7"}, 7),
    ],
)
def test_the_memory_of_a_container_or_a_job_is_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups_of_process: str, limits: dict[str, str], least: int | None
) -> None:
    """Both versions of control groups. Only a container's own limit of the second one was seen before."""
    mounts, listed = tmp_path / "cgroup", tmp_path / "listed"
    listed.write_text(f"{groups_of_process}\n")
    for name, text in limits.items():
        (mounts / name).parent.mkdir(parents=True, exist_ok=True)
        (mounts / name).write_text(f"{text}\n")
    monkeypatch.setattr(memory, "_GROUPS", listed)
    monkeypatch.setattr(memory, "_MOUNTS", mounts)
    if least is None:
        assert memory.main_memory() > 7
    else:
        assert memory.main_memory() == least


def test_gpus_that_cannot_be_counted_are_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the CPU would silently do what is left of a run after a driver's upgrade."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho Driver/library version mismatch; exit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SPPOError, match="Driver/library version mismatch.*--gpus none"):
        devices("auto")
    program.write_text("#!/bin/sh\necho No devices were found; exit 6\n")
    assert devices("auto") == [""]


def test_no_room_for_a_shard_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(SPPOError, match="no machine has room for a shard.*--world_size"):
        run_shards(SimpleNamespace(slots=lambda: 0), 2, None, tmp_path, "s", ["true"])


def test_all_shards_progress_in_one_line(tmp_path: Path) -> None:
    bars = [
        "0:  17%|x | 5/29 [00:10<00:29, 2.1prompt/s, 512 tok/s]\r0: 34%|x | 10/29 [00:20<00:19, 2prompt/s, 812 tok/s]",
        "shard 1:  34%|x | 10/30 [00:20<1:01:29, 10.15prompt/s, 188 tok/s]",
    ]
    logs = [tmp_path / str(i) for i in range(2)]
    for log, bar in zip(logs, bars, strict=True):
        log.write_text(f"generate: rows\n{bar}")
    assert progress_line(logs, "generate") == "generate: 20 of 59 prompts, 2 shards, 1000 tok/s, 1:01:29 left"
    logs[0].write_text("train: going on\n 30%|x | 3/10 [00:10<00:20, 3.10s/it]")
    assert progress_line(logs[:1], "train") == "train: 3 of 10 steps, 00:20 left"
    with open(logs[0], "a") as log:  # a checkpoint is saved, as transformers shows it
        log.write("\n\nWriting model shards: 100%|x | 1/1 [00:00<00:00, 98it/s]\x1b[A")
    assert progress_line(logs[:1], "train") == "train: 3 of 10 steps, 00:20 left"
    logs[0].write_text("train: going on\nLoading weights: 100%|x | 21/21 [00:00<00:00, 9348.37it/s]\n")
    assert progress_line(logs[:1], "train") == "train: going on"
    logs[0].write_text("reference log-probs:  50%|x | 8/16 [00:10<00:10, 2.10row/s]")
    assert progress_line(logs[:1], "train") == "train: 8 of 16 rows, 00:10 left"


def test_a_library_s_warnings_are_not_taken_for_progress(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("WARNING 11-25 01:00:00 [input_processor.py:409] Passing raw prompts is deprecated\n")
    assert progress_line([log], "generate") == "generate: starting"
    log.write_text("generate: rows 0 to 9 of 9: 9 to do\n(EngineCore) WARNING: no time to spare\n")
    assert progress_line([log], "generate") == "generate: rows 0 to 9 of 9: 9 to do"
    with open(log, "a") as out:  # vLLM, while it starts
        out.write("100%|x | 1/1 [00:00<00:00, 31.5it/s]\n")
    assert progress_line([log], "generate") == "generate: rows 0 to 9 of 9: 9 to do"


def test_what_a_rank_raised_is_shown_although_its_launcher_says_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["Traceback (most recent call last):", '  File "trainer.py", line 7, in save', "    write(path)",
           "FileNotFoundError: no such file: optimizer.pt"]  # fmt: skip
    launcher = ["Traceback (most recent call last):", '  File "api.py", line 383, in launch_agent', "    raise Child(",
                "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ", *["===="] * 40]  # fmt: skip
    (tmp_path / "train.1.log").write_text("\n".join([*own, *(f"[rank0]: {line}" for line in own), *launcher, ""]))
    show_failure("train", "ended with code 1", tmp_path / "train.1.log")
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == 'FileNotFoundError: no such file: optimizer.pt (File "trainer.py", line 7, in save)'
    assert sum("optimizer.pt" in line for line in said) == 1
    assert not any("ChildFailedError" in line for line in said)


def test_the_chain_hands_its_flags_on_to_the_letter(tmp_path: Path) -> None:
    """Seen by a PYTHON that writes its words down: generate.sh is its commands, each with the flags as they came."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f'#!/bin/bash\nfor word in "$@"; do printf "%s^" "$word"; done >> {log}; echo >> {log}\n')
    python.chmod(0o755)
    flags = [
        "--model=it's $(touch pwned) `touch pwned`",
        "--prompt",
        "p.jsonl",
        "--top_p",
        "0.8",
        "--system_prompt",
        "",
    ]
    tiny.succeed("scripts/generate.sh", *flags, "--out_path", tmp_path / "data", PYTHON=str(python))
    commands = [line.split("^")[:-1] for line in log.read_text().splitlines()]
    names = [" ".join(Path(w).name for w in words if w.endswith(".py")) for words in commands]
    assert names == [
        "generate.py", "launch.py generate.py", "combine_generate.py", "preload.py", "launch.py rank.py",
        "compute_prob.py", "push_to_hub.py",
    ]  # fmt: skip
    asked = [*flags, "--out_path", str(tmp_path / "data")]
    for words in commands:
        first = words.index(asked[0])
        assert words[first : first + len(asked)] == asked
    assert not list(tiny.ROOT.rglob("pwned"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["generate", "--out_path=x", "--top_q=1"], "unknown flag --top_q; did you mean --top_p?"),
        (["generate", "--out_path=x", "--top_p=2"], "top_p: '2' is not between"),
        (["generate", "--out_path=x", "--part=3/3"], "the first below the second"),
        (["pipeline", "--dataset=d", "--output_dir=o", "--optim"], "--optim needs a value"),
    ],
)
def test_a_wrong_flag_ends_a_chain_before_its_first_command(flags: list[str], said: str) -> None:
    done = tiny.run(f"scripts/{flags[0]}.sh", *flags[1:])
    assert done.returncode == 2
    assert said in done.stderr
    assert not done.stdout


# a stage of the tests' own: shard 0 does what argv[1] says, the others sleep; all leave a child behind
STAGE = """
import os, subprocess, sys, time
shard = sys.argv[sys.argv.index("--data_frac") + 1]
what, marks = sys.argv[1], sys.argv[2]
if shard == "0" and what == "fail":
    while not (os.path.exists(f"{marks}/1") and os.path.exists(f"{marks}/2")):
        time.sleep(0.1)
    child = subprocess.Popen(["sleep", "300"])
    open(f"{marks}/0", "w").write(str(child.pid))
    print("the last words"); sys.exit(7)
if what != "succeed":
    child = subprocess.Popen(["sleep", "300"])
    open(f"{marks}/.{shard}", "w").write(str(child.pid)); os.rename(f"{marks}/.{shard}", f"{marks}/{shard}")
    time.sleep(300)
print("progress 1\\rprogress 2\\rshard", shard, "of", sys.argv[-1], "done")
"""


def command(tmp_path: Path, what: str) -> list[str]:
    (tmp_path / "stage.py").write_text(STAGE)
    launch = [
        sys.executable,
        "tests/shards.py",
        "--gpus",
        "none,none,none",
        "--logs",
        str(tmp_path / "logs"),
    ]
    return [
        *launch,
        "--logs",
        str(tmp_path / "logs"),
        "--stage",
        "s",
        "--",
        sys.executable,
        str(tmp_path / "stage.py"),
        what,
        str(tmp_path),
    ]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_all_gone(tmp_path: Path, count: int) -> None:
    marks = [p for p in tmp_path.iterdir() if p.name.isdigit()]
    assert len(marks) == count
    tiny.wait_until(lambda: not any(alive(int(p.read_text())) for p in marks))


def test_all_shards_run_and_tries_keep_their_logs(tmp_path: Path) -> None:
    for _ in range(2):
        assert "shard 2 of 3 done" in tiny.succeed(*command(tmp_path, "succeed"))
    assert len(list((tmp_path / "logs").iterdir())) == 6
    assert last_lines(tmp_path / "logs" / "s-0.1.log", 5) == ["shard 0 of 3 done"]


# a stage that writes a manifest a shard, and says which shards each of its processes got
PARTS = """
import sys
from pathlib import Path
from sppo.store.shards import lay_out
where = {flag: sys.argv[sys.argv.index(flag) + 1] for flag in ("--data_frac", "--numgpu")}
lay_out(Path(sys.argv[1]), int(where["--numgpu"]))
for number in where["--data_frac"].split(","):
    open(f"{sys.argv[1]}/shard-{int(number):05d}.manifest.json", "x").write("{}")
print("mine:", where["--data_frac"], "of", where["--numgpu"])
"""


def parts(tmp_path: Path, *flags: str) -> list[str]:
    (tmp_path / "parts.py").write_text(PARTS)
    where = [f"--logs={tmp_path / 'logs'}", "--stage=p", f"--shards_dir={tmp_path / 'parts'}", *flags]
    own = [sys.executable, str(tmp_path / "parts.py"), str(tmp_path / "parts")]
    return [sys.executable, "tests/shards.py", *where, "--", *own]


def test_more_shards_than_devices_go_to_few_processes_first_many_then_few(tmp_path: Path) -> None:
    """An engine's start is paid for each process and not for each shard, and at the end no device waits for long."""
    tiny.succeed(*parts(tmp_path, "--gpus=none,none", "--shards=40"))
    said = [line.split() for log in (tmp_path / "logs").iterdir() for line in log.read_text().splitlines()]
    taken = sorted(([int(n) for n in words[1].split(",")] for words in said), key=lambda each: each[0])
    assert [n for each in taken for n in each] == list(range(40))
    sizes = [len(each) for each in taken]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) < 20
    assert sizes[0] >= 8
    assert sizes[-2:] == [1, 1]
    assert {words[3] for words in said} == {"40"}


def test_a_stage_keeps_its_number_of_shards_when_the_devices_change(tmp_path: Path) -> None:
    """Begun on 3 GPUs, gone on with 1: the shards are those that were begun. Before it was refused."""
    tiny.succeed(*parts(tmp_path, "--gpus=none,none,none"))
    for manifest in (tmp_path / "parts").glob("*.manifest.json"):
        manifest.rename(manifest.with_name(manifest.name.replace(".manifest.json", ".journal")))
    shown = tiny.succeed(*parts(tmp_path, "--gpus=none"))
    assert "of 3" in shown
    refused = tiny.run(*parts(tmp_path, "--gpus=none", "--shards=5"))
    assert refused.returncode == 1
    assert "is made in 3 shards; leave --shards out, or pass --overwrite" in refused.stderr


def test_asked_to_stop_shards_end_and_nothing_is_left(tmp_path: Path) -> None:
    """touch <run_dir>/stop: what a cluster's job does shortly before its time is over."""
    stop = tmp_path / "stop"
    process = subprocess.Popen(command(tmp_path, "sleep"), cwd=tiny.ROOT, env={**os.environ, "SPPO_STOP": str(stop)})
    tiny.wait_until(lambda: len([p for p in tmp_path.iterdir() if p.name.isdigit()]) == 3)
    stop.touch()
    assert process.wait(30) == 130
    assert_all_gone(tmp_path, 3)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--launcher=slurm"], "works inside an allocation"),
        (["--nodes=2"], "--launcher local is one machine"),
        (["--launcher=ray", "--gpus=0,1"], "auto, or none"),
        (["--ray_address=auto"], "--ray_address is for --launcher ray"),
    ],
)
def test_flags_of_a_cluster_that_do_not_fit_are_wrong_use(tmp_path: Path, flags: list[str], said: str) -> None:
    done = tiny.run(*parts(tmp_path, *flags), SLURM_JOB_ID="")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr


def test_the_first_failure_stops_the_rest_and_gives_its_code(tmp_path: Path) -> None:
    done = tiny.run(*command(tmp_path, "fail"))
    assert done.returncode == 7
    assert "the last words" in done.stderr
    assert "s 0 ended with code 7" in done.stderr
    assert_all_gone(tmp_path, 3)


def test_a_driver_outlives_the_shell_that_started_it(tmp_path: Path) -> None:
    """nohup ... & and log out: the run goes on. What generate.sh starts dies with generate.sh."""
    pids = []
    for child in ("", "1"):
        here = tmp_path / f"run{child}"
        here.mkdir()
        line = f"{shlex.join(command(here, 'sleep'))} > /dev/null 2>&1 & echo $!; "
        line += f"until [ -e {here}/0 ] && [ -e {here}/1 ] && [ -e {here}/2 ]; do sleep 0.1; done"
        environment = {k: v for k, v in os.environ.items() if k != "SPPO_CHILD"} | (
            {"SPPO_CHILD": child} if child else {}
        )
        shell = subprocess.run(["bash", "-c", line], cwd=tiny.ROOT, env=environment, capture_output=True, text=True)
        pids.append(int(shell.stdout))
    tiny.wait_until(lambda: not alive(pids[1]))  # its shell ended after the first's, which is alive all the same
    assert alive(pids[0])
    os.kill(pids[0], signal.SIGTERM)
    assert_all_gone(tmp_path / "run", 3)
    for mark in (tmp_path / "run1").glob("[0-9]"):  # a stage's own children are its own affair
        os.kill(int(mark.read_text()), signal.SIGKILL)


def hear_interrupts() -> None:
    """A job in the background of a script ignores SIGINT; a driver on a terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_driver_leaves_no_process(tmp_path: Path, signum: int) -> None:
    process = subprocess.Popen(
        command(tmp_path, "sleep"),
        cwd=tiny.ROOT,
        stderr=subprocess.DEVNULL,
        preexec_fn=hear_interrupts,
    )
    tiny.wait_until(lambda: len([p for p in tmp_path.iterdir() if p.name.isdigit()]) == 3)
    os.kill(process.pid, signum)
    assert process.wait(30) == 130
    assert_all_gone(tmp_path, 3)


def test_one_process_on_a_cpu_has_the_environment_that_accelerate_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = ["--config_file", "recipes/accelerate_configs/cpu.yaml", "train.py"]
    theirs, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    expected = prepare_simple_launcher_cmd_env(theirs)[1]
    args = Namespace(devices="", accelerate_config="cpu", machines=1)
    command, ours = machine.command(args, ["--beta=0.1"])
    assert command[1].endswith("run_sppo.py")
    assert command[2:] == ["--beta=0.1"]
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS"):
        assert ours[name] == expected[name], name


def test_a_second_start_does_not_run_with_the_settings_of_the_first(tmp_path: Path) -> None:
    """Between plan.py and hold.py another start can write its recipes into the same directory."""
    recipe, plan = tmp_path / "run" / "iter1" / "recipe.yaml", tmp_path / "plan"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("maxlen: 21\n")
    plan.write_text(f"{tmp_path / 'run'}\n{digest_of_recipes([recipe])}\n{recipe}\n")
    line = f'exec 9>> "{tmp_path}/run/.lock"; {sys.executable} scripts/hold.py --run_dir={tmp_path}/run --plan={plan}'
    assert tiny.run("bash", "-c", line).returncode == 0
    recipe.write_text("maxlen: 22\n")
    refused = tiny.run("bash", "-c", line)
    assert refused.returncode == 1
    assert "another start has planned" in refused.stderr


def test_what_is_started_by_a_script_that_is_dead_already_ends_at_once() -> None:
    """A kill may come while Python starts, before it can ask to be told of its parent's death."""
    assert tiny.run("scripts/combine_generate.py", "--output_dir=x", SPPO_PARENT="1").returncode == 130


def test_bash_scripts_find_the_project_and_know_a_flag_from_a_value() -> None:
    assert "one process a GPU" not in tiny.succeed("scripts/generate.sh", "--help", CDPATH=f".:{tiny.ROOT}")
    done = tiny.run("scripts/generate.sh", "--system_prompt", "read the --help page", "--model=m")
    assert done.returncode == 2
    assert "--output_dir (--out_path) is missing" in done.stderr


def test_many_machines_meet(tmp_path: Path) -> None:
    """Each calls each other, and nobody takes a call before all are made: more wait than Python lets by itself."""
    count = 140
    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(nodes.meet_all, tmp_path, rank, count, "127.0.0.1") for rank in range(count)]
        assert [one.result() for one in asked] == [([], False)] * count

"""Pushing, with the real client against a local server that speaks the Hub's protocol and checks the token."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_server
import pyarrow.parquet as pq
import pytest
import tiny
from hub_server import TOKEN, Failure, Hub, Repo
from huggingface_hub import DatasetCard, ModelCard, constants
from huggingface_hub.utils import close_session

from sppo.command.errors import run_main
from sppo.hub.push import unpushed
from sppo.pairing.training_set import compute_prob
from sppo.recipe import Recipe
from sppo.store.files import digest, read_json

pytestmark = pytest.mark.slow

GENERATED, SCORE, MODEL = "me/data-x-iter1_generated", "me/synthetic_data_x-iter1_score", "me/x-iter1"
AWKWARD = 'it\'s "a" run $(touch pwned) `x` #1'
Push = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def made(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(A run of one iteration in a directory with an awkward name, what the loop printed while the Hub refused all)."""
    root = tmp_path_factory.mktemp("made")
    prompts = tiny.write_jsonl(
        root / "prompts.jsonl", [{"prompt": f"Name {i} rivers"} for i in range(8)] + [{"prompt": ""}]
    )
    command = ["run_sppo_llama-3.sh", "--recipe", "recipes/sppo/demo.yaml", "--model", models / "llama3"]
    command += [
        "--prompts",
        prompts,
        "--ranker",
        models / "PairRM",
        "--pairs",
        "3",
        "--maxlen",
        "8",
        "--test_size",
        "2",
    ]
    command += ["--iterations", "1", "--global_batch_size", "2", "--batch_size", "2", "--gpus", "none", "--name", "x"]
    command += ["--run_dir", root / AWKWARD, "--org", "me", "--push_model", "--public"]
    with hub_server.running() as hub:
        hub.failures = [hub_server.Failure("/api/repos/create", times=9, status=403)]
        done = tiny.run(*command, **hub.env)
        shown = done.stdout + done.stderr
        assert done.returncode == 1, shown
        assert hub.repos == {}
        # what the preflight and the two pushes ask for, and nothing else: no other stage talks to the Hub, token or not
        who, *asked = ["GET /api/whoami-v2", "POST /api/repos/create", f"GET /api/datasets/{GENERATED}"]
        assert hub.requests == [who, *asked, asked[0], f"GET /api/models/{MODEL}"]
    return root / AWKWARD, shown


@pytest.fixture
def here(made: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the run's iteration, to do something to."""
    return Path(shutil.copytree(made[0], tmp_path / AWKWARD)) / "iter1"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The server, and this process's client turned to it."""
    with hub_server.running() as server:
        for key, value in server.env.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        (tmp_path / "scratch").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
        yield server
        close_session()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it would have slept, each time."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def push(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], here: Path, tmp_path: Path) -> Push:
    """push_to_hub.py in this process: push("--flag") gives its exit code and what it printed. Always without the token,
    and without anything left behind in the scratch directory.
    """

    def run(*flags: str | Path, what: str = "--output_dir") -> tuple[int, str]:
        main = runpy.run_path(str(tiny.ROOT / "scripts/push_to_hub.py"))["main"]
        place = here / ("data" if what == "--output_dir" else "model")
        argv = ["push_to_hub.py", what, place, "--org", "me", "--name", "x-iter1", *flags]
        monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
        monkeypatch.setattr("sppo.command.errors.leave", sys.exit)
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as done:
            run_main(main)
        signal.signal(signal.SIGTERM, before)
        shown = "".join(capfd.readouterr())
        assert TOKEN not in shown
        assert "Traceback" not in shown
        assert list((tmp_path / "scratch").iterdir()) == []
        return done.value.code, shown

    return run


def table(card: str, title: str) -> dict[str, str]:
    """The rows of a card's table, by their first cell."""
    part = card.partition(f"| {title} |")[2].partition("\n\n")[0]
    return dict(line[2:-2].split(" | ", 1) for line in part.splitlines()[2:])


def test_both_data_sets_arrive_whole_and_private(hub: Hub, push: Push, here: Path, tmp_path: Path) -> None:
    modes = set()
    hub.watch = lambda _: modes.update(oct(p.stat().st_mode & 0o777) for p in (tmp_path / "scratch").iterdir())
    code, shown = push()
    assert code == 0, shown
    assert modes == {"0o700"}
    assert set(hub.repos) == {GENERATED, SCORE}
    for repo in hub.repos.values():
        assert repo.private
        assert repo.kind == "dataset"
        assert repo.tags == {"iter1": repo.commits[-1]}
    for split in ("train", "test"):
        sent = hub.repos[SCORE].files[f"data/{split}-00000-of-00001.parquet"]
        assert sent == (here / "data" / f"{split}.parquet").read_bytes()
    assert sum(r.startswith("PUT /lfs/") for r in hub.requests) == hub.requests.count("POST /verify") == 3
    import datasets

    for name, splits in ((GENERATED, {"train": 8}), (SCORE, {"train": 6, "test": 2})):  # as a user gets it
        for path, content in hub.repos[name].files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(content)
        loaded = datasets.load_dataset(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        assert {split: len(rows) for split, rows in loaded.items()} == splits
    row = datasets.load_dataset(str(tmp_path / GENERATED), split="train", cache_dir=str(tmp_path / "cache"))[0]
    drawn = {r["prompt_id"]: r for r in pq.read_table(here / "data" / "responses.parquet").to_pylist()}
    answer = drawn[row["prompt_id"]]["responses"][2]["text"]
    assert row["generate_2"] == [*row["prompt"], {"role": "assistant", "content": answer}]


def test_a_data_sets_card_says_what_the_manifests_say(hub: Hub, push: Push, here: Path, models: Path) -> None:
    assert push()[0] == 0
    made, drawn = (read_json(here / "data" / f"{name}.manifest.json") for name in ("train", "responses"))
    for name, repo in hub.repos.items():
        text = repo.files["README.md"].decode()
        card = DatasetCard(text)
        assert card.data.tags == ["sppo", "preference", "synthetic"]
        assert card.data.size_categories == ["n<1K"]
        assert card.data.pretty_name == name.split("/")[1]
        assert card.data.license is None  # the user's to choose
        splits = {Path(f["path"]).name.split("-")[0] for f in card.data.configs[0]["data_files"]}
        assert splits == ({"train", "test"} if name == SCORE else {"train"})
        columns = pq.read_schema(here / "data" / "train.parquet").names
        generated = ["prompt_id", "prompt", "probability", "rm_scores", *(f"generate_{k}" for k in range(3))]
        assert list(table(text, "column")) == (columns if name == SCORE else generated)
        settings, counts, statistics = (table(text, title) for title in ("setting", "count", "statistic"))
        assert (settings["policy"], settings["prompts"], settings["ranker"]) == ("llama3", "prompts.jsonl", "PairRM")
        assert (settings["K"], settings["estimator"], settings["temperature"]) == ("3", "paper", "1.0")
        assert counts["prompts"] == str(drawn["counts"]["prompts"]) == "9"
        assert counts["skipped: empty"] == "1"
        assert counts["tokens in responses"] == str(drawn["counts"]["response_tokens"])
        assert (counts["rows in train"], counts["rows in test"]) == ("6", "2")
        assert counts["prompts ranked"] == str(made["counts"]["prompts"])
        assert statistics["pairs with win rate 1/2"] == str(made["counts"]["tied_pairs"])
        assert statistics["position bias: above 0, what is shown first wins"] == str(made["counts"]["position_bias"])
        p = made["counts"]["p"]
        assert f"| p | {p['mean']} | {p['quantiles']} |" in text
        assert table(text, "package") == made["versions"]
        for private in (str(here), str(models), "/tmp/", str(Path.home()), TOKEN, hub.url):  # noqa: S108
            assert private not in text


def test_data_without_our_manifests_has_a_card_too(hub: Hub, push: Push, here: Path) -> None:
    (here / "data" / "responses.manifest.json").unlink()
    shutil.rmtree(here / "data" / "ranking")
    code, shown = push()
    assert code == 0, shown
    assert table(hub.repos[SCORE].files["README.md"].decode(), "count")["rows in train"] == "6"


def test_what_is_pushed_is_pushed_once_and_what_changed_again(hub: Hub, push: Push, here: Path) -> None:
    push()
    first = dict(hub.repos[SCORE].tags)
    record = read_json(here / "data" / "pushed.json")
    assert record[SCORE]["commit"] == first["iter1"]
    assert record[SCORE]["private"]
    hub.requests.clear()
    code, shown = push()
    assert (code, hub.requests) == (0, [])
    assert f"done: {SCORE}" in shown
    recipe = Recipe(pairs=3, test_size=2, estimator="released")
    compute_prob(recipe, here / "data", True)
    code, shown = push()
    assert code == 0
    assert f"tag iter1 moves from commit {first['iter1']}" in shown
    for repo in hub.repos.values():
        assert len(repo.commits) == 3
        assert repo.tags == {"iter1": repo.commits[-1]}
    assert (here / "data" / "train.parquet").read_bytes() in hub.repos[SCORE].files.values()


def test_compute_prob_pushes_when_it_is_asked_to(hub: Hub, here: Path) -> None:
    command = ["scripts/compute_prob.py", "--output_dir", here / "data", "--pairs=3", "--test_size=2", "--overwrite"]
    tiny.succeed(*command, "--org=me", "--name=x-iter1", **hub.env)
    assert set(hub.repos) == {GENERATED, SCORE}
    assert all(repo.private for repo in hub.repos.values())


def test_data_that_is_not_what_its_manifest_says_is_not_pushed(hub: Hub, push: Push, here: Path) -> None:
    shutil.copyfile(here / "data" / "test.parquet", here / "data" / "train.parquet")
    code, shown = push()
    assert code == 1
    assert "run compute_prob.py again" in shown
    assert hub.requests == []


def test_what_others_see_is_only_what_was_meant_for_them(hub: Hub, push: Push) -> None:
    hub.repos[SCORE] = Repo("dataset", private=False)
    code, shown = push()
    assert code == 1
    assert f"{SCORE} is public on the Hub already and --public was not given" in shown
    assert hub.repos[SCORE].files == {}
    assert hub.repos[GENERATED].private
    code, shown = push("--public")
    assert code == 0
    assert f"{GENERATED} is there already and stays private" in shown
    assert hub.repos[SCORE].files
    hub.repos.clear()
    assert push("--public", "--name", "y")[0] == 0
    assert not any(repo.private for repo in hub.repos.values())


def test_without_an_iteration_the_tag_is_a_digest(hub: Hub, push: Push, here: Path) -> None:
    assert push("--name", "reiter7x")[0] == 0
    digest = read_json(here / "data" / "train.manifest.json")["outputs"]["train.parquet"]
    assert all(list(repo.tags) == [digest[:12]] for repo in hub.repos.values())


@pytest.mark.parametrize(
    "failure",
    [
        Failure("POST /api/repos/create", times=3),
        Failure("POST /api/repos/create", times=1, status=429, headers={"Retry-After": "77"}),
        Failure("PUT /lfs/", times=2, drop=True),
        Failure("PUT /lfs/", times=7, status=500),  # more than the client itself stands
        Failure("/commit/", drop=True),
        Failure("POST /verify", times=1, status=502),
        Failure("/tag/", times=2),
        Failure("/validate-yaml", drop=True),
    ],
    ids=lambda f: f"{f.on.split()[-1]}-{'drop' if f.drop else f.status}",
)
def test_trouble_passes(hub: Hub, push: Push, here: Path, waits: list[float], failure: Failure) -> None:
    failure = Failure(**vars(failure))
    hub.failures.append(failure)
    code, shown = push()
    assert code == 0, shown
    assert failure.times == 0
    assert waits
    assert failure.status != 429 or max(waits) == 77
    assert (here / "data" / "train.parquet").read_bytes() in hub.repos[SCORE].files.values()
    assert all(repo.tags == {"iter1": repo.commits[-1]} for repo in hub.repos.values())


REFUSALS = {
    "another's token": "pushing me/data-x-iter1_generated: the Hub refuses (401): Invalid username or password.",
    "no token": "there is no token; set HF_TOKEN or run `hf auth login`",
    "no rights": "(403): You don't have the rights to create a dataset here; check --org",
    "a storage that refuses": "pushing me/data-x-iter1_generated: the Hub refuses (403)",
    "offline": "HF_HUB_OFFLINE is set; unset it",
    "nobody there": "(after 4 tries)",
    "a card that it does not take": '(400): "licence" is not valid "tags" is not valid',
}


@pytest.mark.parametrize("trouble", REFUSALS)
def test_a_failure_costs_nothing_local(
    hub: Hub, push: Push, here: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    before = tiny.contents(here)
    if trouble == "another's token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif trouble == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(here / "no-token"))
    elif trouble == "no rights":
        hub.orgs["me"] = "read"
    elif trouble == "a storage that refuses":
        hub.failures.append(Failure("PUT /lfs/", status=403))
    elif trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif trouble == "nobody there":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
    else:
        monkeypatch.setattr("sppo.hub.push.data_card", lambda *_: "---\nlicence: [1]\ntags: 7\n---\n")
    code, shown = push()
    assert code == 1
    assert REFUSALS[trouble] in shown
    assert "hf_wrong" not in shown
    assert hub_server.SIGNATURE not in shown
    assert len(waits) == (3 if trouble == "nobody there" else 0)
    assert tiny.contents(here) == before
    assert shown.rstrip().splitlines()[-1].endswith("--org=me --name=x-iter1")


@pytest.mark.parametrize("name", ["../x", "a/b", "x--y", "", "x" * 90])
def test_a_name_that_the_hub_does_not_take_is_wrong_use(hub: Hub, push: Push, name: str) -> None:
    code, shown = push("--name", name)
    assert code == 2, shown
    assert hub.requests == []


def test_a_model_arrives_without_what_is_private(hub: Hub, push: Push, here: Path, models: Path) -> None:
    model = here / "model"
    for extra in ("training_args.bin", "optimizer.pt", ".hidden.json"):
        (model / extra).write_bytes(b"pickle")
    (model / "checkpoint-1").mkdir()
    (model / "checkpoint-1" / "config.json").write_text("{}")
    config = read_json(model / "tokenizer_config.json")
    config |= {"name_or_path": str(models / "llama3"), "special_tokens_map_file": "/home/me/cache/map.json"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    as_trained(model, "tokenizer_config.json")
    before = tiny.contents(here)
    code, shown = push(what="--model_dir")
    assert code == 0, shown
    repo = hub.repos[MODEL]
    assert repo.private
    assert repo.kind == "model"
    assert repo.tags == {"iter1": repo.commits[-1]}
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md", "metrics.jsonl"}
    assert expected | {"tokenizer.json", "tokenizer_config.json", "sppo_manifest.json"} <= set(repo.files)
    assert not [name for name in repo.files if name.endswith((".bin", ".pt")) or "/" in name or name.startswith(".")]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert repo.files[name] == (model / name).read_bytes()
    written = json.loads(repo.files["sppo_manifest.json"])
    assert written["model"] == "llama3"
    for name, sha in written["outputs"].items():  # whoever fetches it can check it
        (model.parent / "fetched").write_bytes(repo.files[name])
        assert digest(model.parent / "fetched") == sha
    (model.parent / "fetched").unlink()
    sent = json.loads(repo.files["tokenizer_config.json"])
    assert (sent["name_or_path"], sent["special_tokens_map_file"]) == ("llama3", "map.json")
    assert ModelCard(repo.files["README.md"].decode()).data.tags == ["sppo", "alignment"]
    for name, content in repo.files.items():
        for private in (str(here), str(models), "/tmp/", TOKEN):  # noqa: S108
            assert private.encode() not in content, name
    after = tiny.contents(here)
    assert set(after) - set(before) == {"pushed-model.json"}  # beside the model: its identity stays
    assert before.pop("unpushed-model.txt")  # of the run's own push, which failed
    assert {name: after[name] for name in after if name != "pushed-model.json"} == before
    hub.requests.clear()
    assert push(what="--model_dir")[0] == 0
    assert hub.requests == []


def as_trained(model: Path, name: str) -> None:
    """Let the manifest say of a file what is there now, as if training had written it."""
    manifest = read_json(model / "sppo_manifest.json")
    manifest["outputs"].pop(name, None)
    if (model / name).exists():
        manifest["outputs"][name] = digest(model / name)
    (model / "sppo_manifest.json").write_text(json.dumps(manifest))


def test_a_models_old_shards_go_and_others_files_stay(hub: Hub, push: Push, here: Path) -> None:
    shutil.copyfile(here / "model" / "model.safetensors", here / "model" / "model-00002-of-00002.safetensors")
    as_trained(here / "model", "model-00002-of-00002.safetensors")
    push(what="--model_dir")
    hub.repos[MODEL].files["LICENSE"] = b"the user's"
    (here / "model" / "model-00002-of-00002.safetensors").unlink()
    as_trained(here / "model", "model-00002-of-00002.safetensors")
    assert push(what="--model_dir")[0] == 0
    assert "model-00002-of-00002.safetensors" not in hub.repos[MODEL].files
    assert {"LICENSE", "model.safetensors"} <= set(hub.repos[MODEL].files)


def test_an_adapter_names_no_local_base(hub: Hub, push: Push, here: Path, models: Path) -> None:
    base = {"base_model_name_or_path": str(models / "llama3"), "r": 8}
    (here / "model" / "adapter_config.json").write_text(json.dumps(base))
    as_trained(here / "model", "adapter_config.json")
    code, shown = push(what="--model_dir")
    assert code == 0
    assert "who loads it needs that base too" in shown
    sent = json.loads(hub.repos[MODEL].files["adapter_config.json"])
    assert sent == {"base_model_name_or_path": "llama3", "r": 8}


def test_a_directory_without_a_finished_model_is_not_pushed(hub: Hub, push: Push, here: Path) -> None:
    (here / "model" / "sppo_manifest.json").unlink()
    code, shown = push(what="--model_dir")
    assert code == 1
    assert "run pipeline.sh first" in shown
    assert hub.requests == []


def test_the_loop_goes_on_when_the_hub_refuses(made: tuple[Path, str], tmp_path: Path) -> None:
    """It trains on, ends with code 1, and the commands that it prints push everything once the Hub is well."""
    run, shown = made
    assert shown.count("Nothing here is lost. To push it, run:") == 2
    assert (run / "iter1" / "model" / "sppo_manifest.json").exists()  # trained after the push had failed
    assert "done: the last model is" in shown
    commands = shown.partition("to push the rest, run:\n")[2].partition("\n===")[0].splitlines()
    assert len(commands) == 2
    with hub_server.running() as hub:
        for command in commands:
            environment = {**hub.env, "PATH": "/usr/bin:/bin"}
            subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True, capture_output=True)
        assert set(hub.repos) == {GENERATED, SCORE, MODEL}
        assert not any(repo.private for repo in hub.repos.values())  # the loop's --public
    for record in (run / "iter1" / "data" / "pushed.json", run / "iter1" / "pushed-model.json"):
        record.unlink()
    for text in (shown, *(c.decode(errors="replace") for c in tiny.contents(run).values())):
        assert TOKEN not in text
    assert not [p for root in (run.parent, tmp_path, tiny.ROOT) for p in root.glob("**/pwned")]


@pytest.mark.parametrize("failing", ["nothing", "launch", "push_to_hub"])
@pytest.mark.parametrize("script", ["generate.sh", "pipeline.sh"])
def test_the_scripts_push_last_and_only_what_is_whole(tmp_path: Path, script: str, failing: str) -> None:
    """Which commands the two start, seen by a PYTHON that writes them down and fails where it is told to."""
    python, log, place = tmp_path / "python", tmp_path / "log", tmp_path / AWKWARD
    fails = f'case "$*" in *{failing}*) exit 1 ;; esac'
    python.write_text(f'#!/bin/bash\nIFS=^; echo "$*" >> {log}\n{fails}\n')
    python.chmod(0o755)
    training = ["--dataset", "d", "--output_dir", place, "--push_model"]
    flags = ["--out_path", place] if script == "generate.sh" else training
    flags += ["--recipe", "recipes/sppo/demo.yaml", "--org", "me", "--name", "x-iter1", "--public"]
    done = tiny.run(f"scripts/{script}", *flags, PYTHON=str(python))
    lines = log.read_text().splitlines()
    assert done.returncode == (0 if failing == "nothing" else 1)
    pushes = [line for line in lines if "push_to_hub.py" in line]
    if failing == "launch":
        assert not pushes
        return
    assert pushes == lines[-1:]
    words = pushes[0].split("^")
    assert f"--what={'data' if script == 'generate.sh' else 'model'}" in words
    assert words[-len(flags) :] == [str(word) for word in flags]
    assert len(lines) == (7 if script == "generate.sh" else 2)


@pytest.mark.parametrize("what", ["data", "model"])
def test_without_org_the_chain_pushes_nothing(what: str) -> None:
    assert tiny.succeed("scripts/push_to_hub.py", f"--what={what}") == ""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["scripts/push_to_hub.py", "--output_dir", "x", "--name", "x"], "--org is missing"),
        (["scripts/push_to_hub.py", "--org", "me", "--name", "x"], "--output_dir or --model_dir is missing"),
        (["scripts/generate.sh", "--out_path", "x", "--org", "me"], "--org needs --name"),
        (["scripts/generate.sh", "--out_path", "x", "--public"], "--public needs --org"),
        (
            ["scripts/pipeline.sh", "--dataset=d", "--output_dir", "x", "--push_model", "--org", "me"],
            "--push_model needs --org and",
        ),
        (["scripts/pipeline.sh", "--dataset=d", "--output_dir", "x", "--org", "me"], "are for --push_model"),
        (["scripts/plan.py", "--model", "x", "--public"], "--public needs --org"),
        (["scripts/plan.py", "--model", "x", "--push_model"], "--push_model needs --org"),
        (["scripts/plan.py", "--model", "x", "--org", "me", "--name", "a b"], "--name 'a b-iter3'"),
    ],
)
def test_a_push_without_a_place_is_wrong_use(command: list[str], message: str) -> None:
    done = tiny.run(*command)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


def test_a_push_that_fails_in_any_way_is_named_at_the_end_of_the_run(tmp_path: Path) -> None:
    """An error of the disk too, for which push_to_hub.py has no words of its own."""
    data = tmp_path / "iter1" / "data"
    for name in ("train.parquet", "test.parquet"):
        (data / name).mkdir(parents=True)
    (data / "train.manifest.json").write_text("{}")
    command = ["scripts/push_to_hub.py", "--what=data", f"--output_dir={data}", "--org=me", "--name=x-iter1"]
    assert tiny.run(*command, SPPO_RUN="1").returncode == 1
    (left,) = unpushed(tmp_path)
    assert f"--output_dir={data}" in left
    assert "--org=me" in left

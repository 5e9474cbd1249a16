"""rank.py as a user runs it: any ranker, killed and started again, and a ranker on a Hub whose branch moves."""

from __future__ import annotations

import json
import shutil
import sys
import typing
from collections import Counter
from pathlib import Path

import hub_server
import pyarrow.parquet as pq
import pytest
import tiny

from sppo import rankers
from sppo.recipe import Recipe
from sppo.schema import responses_schema
from sppo.store.parquet import write_parquet

RANKER = """
import json, os, time
here = 0  # pairs that this process has asked
def logit(prompt, first, second):
    global here
    with open({log!r}, "a") as handle:
        handle.write(json.dumps([prompt, first, second]) + "\\n")
    here += 1
    while os.path.exists({hold!r}) and here >= int(open({hold!r}).read()):
        time.sleep(0.01)
    return float("nan") if "{unanswered}" in prompt else float(len(first) - len(second))
"""


def write_responses(data: Path, prompts: int, pairs: int) -> Path:
    """responses.parquet as any tool could have written it: no token ids."""

    def answer(i: int, k: int) -> dict:
        return {"text": "x" * (1 + (i * 7 + k * 3) % 11), "token_ids": None, "finish_reason": "stop"}

    rows = [
        {
            "prompt_id": f"p{i}",
            "prompt": [{"role": "user", "content": f"question {i}."}],
            "responses": [answer(i, k) for k in range(pairs)],
        }
        for i in range(prompts)
    ]
    write_parquet(data / "responses.parquet", responses_schema(), rows)
    return data


def function_ranker(directory: Path, unanswered: str = "no such prompt") -> tuple[Path, dict]:
    """(the log of every pair that was asked, the environment in which `asked:logit` is found).

    Where `directory` has a file `hold`, a process answers one pair fewer than it says, then waits until it is gone.
    """
    log = directory / "asked.jsonl"
    source = RANKER.format(log=str(log), hold=str(directory / "hold"), unanswered=unanswered)
    (directory / "asked.py").write_text(source)
    return log, {"PYTHONPATH": str(directory)}


def asked(log: Path) -> Counter[tuple[str, ...]]:
    return Counter(tuple(json.loads(line)) for line in log.read_text().splitlines() if line.endswith("]"))


def test_every_file_of_a_ranker_is_a_choice_of_ranker_backend() -> None:
    """A ranker's module has a function `load`; the others in its folder do not."""
    choices = set(typing.get_args(typing.get_type_hints(Recipe)["ranker_backend"])) - {"auto"}
    files = (tiny.ROOT / "sppo" / "rankers").glob("*.py")
    assert choices == {p.stem.replace("_", "-") for p in files if "\ndef load(" in p.read_text(encoding="utf-8")}
    for name in choices:
        module = rankers.backend(Recipe(ranker_backend=name))
        assert all(callable(getattr(module, function)) for function in ("fetch", "identity", "load"))


def test_a_function_ranks_and_what_it_cannot_answer_is_counted(tmp_path: Path) -> None:
    data = write_responses(tmp_path / "data", 6, 3)
    log, env = function_ranker(tmp_path, unanswered="question 2.")
    said = tiny.succeed(
        "scripts/rank.py", "--output_dir", data, "--ranker", "asked:logit", "--pairs", "3", "--numgpu", "1", **env
    )
    assert '"skipped": {"the ranker\'s logits are not finite": 1}' in said
    rows = {r["prompt_id"]: r for r in pq.read_table(data / "ranking" / "shard-00000.parquet").to_pylist()}
    assert sorted(rows) == ["p0", "p1", "p3", "p4", "p5"]
    texts = ["x" * (1 + (7 + k * 3) % 11) for k in range(3)]  # of p1
    assert rows["p1"]["logits"] == [[float(len(a) - len(b)) for b in texts] for a in texts]
    assert max(asked(log).values()) == 1
    done = tiny.run("scripts/rank.py", "--output_dir", data, "--ranker", "asked:logit", "--pairs", "3", **env)
    assert "rank: done: " in done.stdout
    function_ranker(tmp_path, unanswered="another function")
    refused = tiny.run("scripts/rank.py", "--output_dir", data, "--ranker", "asked:logit", "--pairs", "3", **env)
    assert refused.returncode == 1  # the same name, another function
    assert "inputs.ranker.source" in refused.stderr


def test_killed_and_restarted_asks_nothing_twice(tmp_path: Path) -> None:
    """SIGKILL costs at most the prompts that were being asked, and changes no number."""
    data = write_responses(tmp_path / "data", 40, 3)
    log, env = function_ranker(tmp_path)
    command = [sys.executable, "scripts/rank.py", "--output_dir", str(data), "--ranker", "asked:logit", "--pairs", "3"]
    (tmp_path / "hold").write_text("63")  # in the middle of the eleventh prompt
    kills = 0
    for wanted in (63, 126):
        process = tiny.start(*command, slow=data, **env)
        tiny.kill_when(process, lambda n=wanted: log.exists() and sum(asked(log).values()) == n)
        kills += 1
    (tmp_path / "hold").unlink()
    tiny.succeed(*command[1:], **env)
    counts = asked(log)
    unique = {(f"question {i}.", "x" * a, "x" * b) for i in range(40) for a, b in _lengths(i)}
    assert set(counts) == unique
    assert sum(counts.values()) - len(unique) <= kills * 6  # one prompt in flight at each kill, K(K - 1) pairs
    rows = pq.read_table(data / "ranking" / "shard-00000.parquet").to_pylist()
    assert [r["prompt_id"] for r in rows] == [f"p{i}" for i in range(40)]
    for i, row in enumerate(rows):
        lengths = [1 + (i * 7 + k * 3) % 11 for k in range(3)]
        assert row["logits"] == [[float(a - b) for b in lengths] for a in lengths]


def _lengths(i: int) -> list[tuple[int, int]]:
    lengths = [1 + (i * 7 + k * 3) % 11 for k in range(3)]
    return [(a, b) for x, a in enumerate(lengths) for y, b in enumerate(lengths) if x != y]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ranker", "no_such_module:f"], "not a module:function"),
        (["--ranker", "json:JSONDecodeErrors"], "not a module:function"),
        (["--ranker", "json:__name__"], "not a function"),
        (["--ranker", "./nowhere"], "no such directory"),
        (["--ranker", "x", "--ranker_backend", "pair-rm"], "did you mean pairrm?"),
        (["--ranker", "{models}/mistral"], "a mistral is not a PairRM"),
    ],
)
def test_a_ranker_that_cannot_be(models: Path, tmp_path: Path, flags: list[str], says: str) -> None:
    data = write_responses(tmp_path / "data", 2, 2)
    flags = [f.replace("{models}", str(models)) for f in flags]
    done = tiny.run(
        "scripts/rank.py", "--output_dir", data, "--pairs", "2", "--ranker_prompt", "text", *flags,
        CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_ranker_is_fetched_once_and_pinned(models: Path, tmp_path: Path) -> None:
    """The branch moves after preload.py: every shard still reads the commit that was pinned, and asks no network."""
    base = tmp_path / "base"
    shutil.copytree(models / "tiny-deberta", base)
    (base / "model.safetensors").unlink()  # a base's weights are never asked for
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        shutil.copytree(models / "PairRM", directory)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"model_name": "acme/base"}))
    (second / "README.md").write_text("moved")
    data = write_responses(tmp_path / "data", 4, 2)
    with hub_server.running() as hub:
        env = {**hub.env, "HF_HOME": str(tmp_path / "hf")}
        hub.models = {"acme/PairRM": {"a" * 40: first}, "acme/base": {"c" * 40: base}}
        said = tiny.succeed("scripts/preload.py", "--ranker", "acme/PairRM", "--output_dir", data, **env)
        assert f"pinned to --ranker_revision {'a' * 40}" in said
        hub.models["acme/PairRM"]["b" * 40] = second
        hub.requests.clear()
        rank = ["scripts/rank.py", "--output_dir", data, "--ranker", "acme/PairRM", "--pairs", "2"]
        for shard in ("0", "1"):
            tiny.succeed(*rank, "--ranker_prompt", "text", "--numgpu", "2", "--data_frac", shard, **env)
        tiny.succeed("scripts/preload.py", "--ranker", "acme/PairRM", "--output_dir", data, **env)
        assert hub.requests == []
        assert json.loads((data / "ranker.json").read_text())["revision"] == "a" * 40
        moved = tiny.succeed("scripts/preload.py", "--ranker", "acme/PairRM", **env)
        assert "b" * 40 in moved  # without a pin the branch is followed


@pytest.mark.slow
def test_the_released_commands_work_as_they_stand(models: Path, tmp_path: Path) -> None:
    """The released README's: one shard needs no combining, and rank.py knows whose responses it ranks."""
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"question {i}"} for i in range(5)])
    out = tmp_path / "out"
    shown = tiny.run("scripts/rank.py", "--output_dir", out, "--prompts", prompts)
    assert shown.returncode == 1
    assert "draw the responses first, with scripts/generate.py" in shown.stderr
    draw = ["scripts/generate.py", "--model", models / "llama3", "--output_dir", out, "--prompts", prompts]
    draw += ["--pairs=2", "--maxlen=4", "--engine=transformers"]
    two = ["--numgpu=2", "--output_dir", tmp_path / "two"]
    tiny.succeed(*draw, *two)
    tiny.succeed(*draw, *two, "--data_frac=1")
    rank = ["scripts/rank.py", "--pairs=2", "--ranker", models / "PairRM", "--prompts", prompts, "--output_dir"]
    done = tiny.run(*rank, tmp_path / "two")
    assert done.returncode == 1
    command = f"python scripts/combine_generate.py --output_dir {tmp_path / 'two'} --numgpu 2"
    assert f"put its shards together first: {command}" in done.stderr
    tiny.succeed(*draw)
    tiny.succeed(*rank, out)
    with_model = tiny.succeed(*rank, out, "--model", models / "llama3")
    assert "rank: done: " in with_model  # the model was the same
    tiny.succeed("scripts/compute_prob.py", "--output_dir", out, "--pairs=2")
    assert len(pq.read_table(out / "train.parquet")) + len(pq.read_table(out / "test.parquet")) > 0


def test_a_model_that_changed_since_it_drew_is_not_taken_for_it(models: Path, tmp_path: Path) -> None:
    """rank.py without --model: the responses' manifest names a directory that holds another model by now."""
    model = shutil.copytree(models / "llama3", tmp_path / "model")
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": "question"}])
    draw = ["scripts/generate.py", "--model", model, "--output_dir", tmp_path / "out", "--prompts", prompts]
    tiny.succeed(*draw, "--pairs=2", "--maxlen=4", "--engine=transformers")
    shutil.copyfile(models / "qwen3" / "model.safetensors", model / "model.safetensors")
    done = tiny.run("scripts/rank.py", "--output_dir", tmp_path / "out", "--pairs=2", "--ranker", models / "PairRM")
    assert done.returncode == 1
    assert "is not the model any more that drew" in done.stderr

"""Generation by transformers: the same responses whatever the shards, nothing lost in a kill, nothing joined wrong."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch

from sppo.cli import flags
from sppo.command.errors import SPPOError, UsageError
from sppo.generation.combine import combine, refuse_other_prompts
from sppo.generation.engines import Request, prompt_seed, vllm
from sppo.generation.engines.transformers import _Sampler
from sppo.generation.prompts import load_prompts
from sppo.generation.shards import generate_shards
from sppo.models import chat
from sppo.models import vllm as models_vllm
from sppo.models.policy import open_policy
from sppo.recipe import Recipe
from sppo.store.files import read_json
from sppo.store.shards import Slice

PROMPTS = [f"Why is {n} None{'?' * (n % 5)}" + " and why" * (n % 7) for n in range(21)] + ["Why is 3 None???"]


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> Recipe:
    path = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p} for p in [*PROMPTS, PROMPTS[0], ""]])
    return Recipe(
        model=str(models / "llama3"), prompts=str(path), pairs=3, maxlen=12, engine="transformers", temperature=1.0
    )


def generate(recipe: Recipe, out: Path, shards: int) -> list[dict[str, Any]]:
    for i in reversed(range(shards)):  # order decides nothing
        generate_shards(recipe, out, [Slice(0, i, shards)], False)
    combine(out, shards, recipe.pairs, False)
    return pq.read_table(out / "responses.parquet").to_pylist()


def test_responses_do_not_depend_on_the_shards(recipe: Recipe, tmp_path: Path) -> None:
    one = generate(recipe, tmp_path / "one", 1)
    for shards in (2, 3, 5):
        assert generate(recipe, tmp_path / str(shards), shards) == one
    assert len(one) == len(PROMPTS) + 1
    duplicates = [row for row in one if row["prompt"][0]["content"] == PROMPTS[0]]
    assert len(duplicates) == 2
    assert duplicates[0]["responses"] != duplicates[1]["responses"]  # the released seed made them equal
    manifest = read_json(tmp_path / "one" / "responses.manifest.json")
    assert manifest["counts"]["skipped"] == {"empty": 1}
    assert [s["reason"] for s in manifest["skipped"]] == ["empty"]


def test_rows_hold_what_was_generated(recipe: Recipe, tmp_path: Path) -> None:
    tokenizer = chat.load_tokenizer(Path(recipe.model))
    stops = chat.stop_token_ids(Path(recipe.model), tokenizer)
    for row in generate(recipe, tmp_path / "out", 1):
        assert row["prompt_token_ids"] == chat.prompt_ids(tokenizer, row["prompt"])
        assert len(row["responses"]) == 3
        for r in row["responses"]:
            ended = r["token_ids"][-1] in stops
            assert r["finish_reason"] == ("stop" if ended else "length")
            assert ended or len(r["token_ids"]) == recipe.maxlen
            assert not set(r["token_ids"][:-1]) & stops
            assert tokenizer.decode(r["token_ids"], skip_special_tokens=True) == r["text"]


def test_more_shards_than_prompts_and_wrong_slices(recipe: Recipe, tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "one.jsonl", [{"prompt": "alone"}])
    recipe.prompts = str(path)
    assert len(generate(recipe, tmp_path / "out", 3)) == 1
    assert Slice(4, 1).bounds(10) == (4, 8)
    assert Slice(4, 2).bounds(10) == (8, 10)
    assert Slice(4, 9).bounds(10) == (10, 10)
    assert Slice(0, 0).bounds(10) == (0, 10)
    with pytest.raises(UsageError, match="beyond --numgpu"):
        Slice(0, 3, 3).bounds(10)


def test_a_missing_a_foreign_or_a_stale_shard_is_never_combined(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for i in range(2):
        generate_shards(recipe, out, [Slice(0, i, 3)], False)
    with pytest.raises(SPPOError, match="not finished.*shard-00002"):
        combine(out, 3, 3, False)
    with pytest.raises(SPPOError, match="made in 3 shards, so there are some beyond --numgpu 2"):
        combine(out, 2, 3, False)
    (out / "responses/shards.json").unlink()  # somebody has deleted it
    with pytest.raises(SPPOError, match="end at row 16 of 24"):
        combine(out, 2, 3, False)
    recipe.temperature = 0.9
    generate_shards(recipe, out, [Slice(0, 2, 3)], False)
    with pytest.raises(SPPOError, match="differ in temperature"):
        combine(out, 3, 3, False)
    with pytest.raises(SPPOError, match=r"settings\.temperature: 1\.0 there, 0\.9 now"):
        generate_shards(recipe, out, [Slice(0, 0, 3)], False)
    assert not (out / "responses.parquet").exists()


def test_local_paths_never_ask_the_hub(recipe: Recipe, tmp_path: Path) -> None:
    """Not even with a network at hand: a server that stands for the Hub hears nothing."""
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - the base class's name
            asked.append(self.path)
            self.send_error(500)

        do_HEAD = do_POST = do_GET  # noqa: N815

    command = ["scripts/generate.py", *flags(model=recipe.model, prompts=recipe.prompts, pairs=2, maxlen=4)]
    command += flags(output_dir=tmp_path / "out", engine="transformers")
    with tiny.serving(Listener) as endpoint:
        network = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
        tiny.succeed(*command, **network)
        assert asked == []
        done = tiny.run(*command, "--model", "some/where", "--output_dir", tmp_path / "x", **network)
    assert done.returncode == 1
    assert asked  # so the server would have heard


def test_responses_of_other_prompts_are_noticed(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate(recipe, out, 2)
    refuse_other_prompts(out, recipe.prompts)
    tiny.succeed(
        "scripts/combine_generate.py", "--output_dir", out, "--pairs=3", "--gpu_ids=0,1", "--prompts", recipe.prompts
    )
    with open(recipe.prompts, "a") as handle:
        handle.write('{"prompt": "one more"}\n')
    with pytest.raises(SPPOError, match="not made from"):
        refuse_other_prompts(out, recipe.prompts)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen3"])
def test_every_family_generates(models: Path, recipe: Recipe, tmp_path: Path, family: str) -> None:
    recipe.model = str(models / family)
    recipe.system_prompt = "Be brief."
    if family == "qwen3":
        recipe.chat_template_kwargs = {"enable_thinking": False}
    rows = generate(recipe, tmp_path / "out", 2)
    assert len(rows) == len(PROMPTS) + 1
    tokenizer = chat.load_tokenizer(models / family)
    assert all("Be brief." in tokenizer.decode(row["prompt_token_ids"]) for row in rows)
    assert len({r["text"] for row in rows for r in row["responses"]}) > len(rows)


def test_an_adapter_is_a_model(models: Path, recipe: Recipe, tmp_path: Path) -> None:
    plain = generate(recipe, tmp_path / "plain", 1)
    recipe.model = str(tiny.lora(models / "llama3", tmp_path / "adapter"))
    adapted = generate(recipe, tmp_path / "adapted", 1)
    assert [r["prompt_token_ids"] for r in adapted] == [r["prompt_token_ids"] for r in plain]
    assert [r["responses"] for r in adapted] != [r["responses"] for r in plain]


def test_sixty_thousand_prompts_are_shared_out(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"question {i}"} for i in range(60000)])
    prompts = load_prompts(str(path), Recipe())
    assert len({p.prompt_id for p in prompts}) == 60000
    for shards in (1, 7, 8):
        bounds = [Slice(0, i, shards).bounds(60000) for i in range(shards)]
        assert [b[0] for b in bounds[1:]] == [b[1] for b in bounds[:-1]]
        assert bounds[-1][1] == 60000


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_the_same(recipe: Recipe, tmp_path: Path) -> None:
    """Two shards, SIGKILLed (driver or shard) at ten random moments, against an undisturbed run."""
    tiny.write_jsonl(Path(recipe.prompts), [{"prompt": f"Why is {n} None?" + " and why" * (n % 9)} for n in range(600)])
    recipe.maxlen = 12
    undisturbed = generate(recipe, tmp_path / "calm", 2)
    out = tmp_path / "killed"
    command = [sys.executable, "tests/shards.py", "--gpus=none,none", f"--logs={tmp_path / 'logs'}", "--"]
    command += [sys.executable, str(tiny.ROOT / "scripts/generate.py"), *flags(output_dir=out, engine="transformers")]
    command += flags(**{k: getattr(recipe, k) for k in ("model", "prompts", "pairs", "maxlen", "temperature", "top_p")})
    rng, kept, seen = random.Random(0), 0, set()
    for attempt in range(10):
        process = tiny.start(*command, slow=out)
        target = kept + rng.randint(1, 20)  # journal lines to wait for: moments spread over the work
        tiny.wait_for(process, lambda n=target: journal_lines(out) >= n)
        victim = process.pid if attempt % 2 else rng.choice(children(process.pid) or [process.pid])
        os.kill(victim, signal.SIGKILL)
        process.wait()
        wait_until_gone(out)
        kept = journal_lines(out)
        seen.add(kept)
    assert len(seen) >= 3, f"the kills hit the same moment: {seen}"
    subprocess.run(command, cwd=tiny.ROOT, check=True, stdout=subprocess.DEVNULL)
    combine(out, 2, recipe.pairs, False)
    assert pq.read_table(out / "responses.parquet").to_pylist() == undisturbed


def journal_lines(out: Path) -> int:
    """Finished prompts in journals and shards."""
    lines = 0
    for path in (out / "responses").glob("*.journal"):
        with suppress(FileNotFoundError):  # its shard has just been written
            lines += max(0, path.read_bytes().count(b"\n") - 1)
    return lines + sum(pq.read_metadata(p).num_rows for p in (out / "responses").glob("shard-*.parquet"))


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(c) for c in tasks.read_text().split()] if tasks.exists() else []


def wait_until_gone(out: Path) -> None:
    """No shard outlives its driver: nobody holds a journal's lock."""

    def free(path: Path) -> bool:
        with open(path) as handle, suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    for path in (out / "responses").glob("*.journal"):
        tiny.wait_until(lambda p=path: free(p), 60)


@pytest.mark.parametrize(
    ("free", "shards", "given", "gib", "sequences"),
    [
        (100, 1, None, 16, 256),  # 256 sequences of 64 MiB, and no more
        (32, 1, None, 8, 128),  # a quarter of what is free
        (32, 4, None, 2, 32),  # for all shards of a machine together
        (32, 4, "", 2, 32),  # to vLLM an empty text is none
        (32, 1, "3", 3, 48),
        (1, 1, None, 1, 16),  # vLLM counts in whole GiB
    ],
)
def test_vllms_cache_on_a_cpu_by_hand(
    monkeypatch: pytest.MonkeyPatch, free: int, shards: int, given: str | None, gib: int, sequences: int
) -> None:
    """Keys and values of 4 layers, 2 x 512 numbers of 4 bytes each, for 4096 tokens: 64 MiB."""
    shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 512}
    monkeypatch.setattr(models_vllm, "load_config", lambda _: SimpleNamespace(to_dict=lambda: shape))
    monkeypatch.setattr(models_vllm, "main_memory", lambda: free << 30)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", given or "")
    if given is None:
        monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    policy: Any = None
    assert models_vllm.cpu_cache(policy, 4096, "float32", shards) == {"max_num_seqs": sequences}
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == str(gib)
    for wrong in ("0", "0.5", "2 GiB"):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", wrong)
        with pytest.raises(SPPOError, match=f"VLLM_CPU_KVCACHE_SPACE={wrong}: .* a whole number from 1 on"):
            models_vllm.cpu_cache(policy, 4096, "float32")


def test_vllm_gives_the_same_whatever_the_shards(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU build, in float32: 1, 2, 3 and 5 shards, in any order, and duplicates differ."""
    pytest.importorskip("vllm")
    engine = vllm.start(open_policy(recipe.model), recipe, 256)
    monkeypatch.setattr(vllm, "draw", partial(vllm.draw_from, engine))
    recipe.engine = "vllm"

    def drawn(shards: int) -> list[dict[str, Any]]:
        rows = generate(recipe, tmp_path / str(shards), shards)
        for response in (r for row in rows for r in row["responses"]):
            del response["logps"]  # vLLM's differ in the last place with what is computed beside
        return rows

    one = drawn(1)
    for shards in (2, 3, 5):
        assert drawn(shards) == one
    duplicates = [row for row in one if row["prompt"][0]["content"] == PROMPTS[0]]
    assert duplicates[0]["responses"] != duplicates[1]["responses"]
    assert len({r["text"] for r in one[0]["responses"]}) > 1
    vllm.end(engine)


@pytest.mark.slow
def test_vllm_takes_an_adapter(models: Path, recipe: Recipe, tmp_path: Path) -> None:
    """All but greedy, vLLM's first tokens with the adapter are those of the merged adapter, not the base's."""
    pytest.importorskip("vllm")
    adapter, recipe.temperature = str(tiny.lora(models / "llama3", tmp_path / "adapter")), 0.01

    def first_tokens(engine: str, model: str) -> list[int]:
        recipe.engine, recipe.model = engine, model
        rows = generate(recipe, tmp_path / f"{engine}-{Path(model).name}", 1)
        return [row["responses"][0]["token_ids"][0] for row in rows]

    drawn = first_tokens("vllm", adapter)
    merged, base = (first_tokens("transformers", m) for m in (adapter, str(models / "llama3")))
    agree = [sum(a == b for a, b in zip(drawn, other, strict=True)) / len(drawn) for other in (merged, base)]
    assert agree[0] >= 0.85, agree
    assert agree[1] <= 0.5, agree


def test_the_sampler_draws_from_the_nucleus() -> None:
    """Frequencies over 20,000 seeds against temperature and top-p worked out by hand."""
    recipe = Recipe(pairs=20000, temperature=0.5, top_p=0.8)
    request = Request("p", [0], prompt_seed(1, "p"), 1)
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]]).repeat(20000, 1)
    sampler = _Sampler(recipe, [request], 1, 1)
    drawn = sampler(torch.zeros(20000, 1, dtype=torch.long), logits).argmax(-1)
    # softmax of logits / 0.5: e^4, e^2, 1, e^-2 -> .8650, .1171, ...: the first alone reaches 0.8
    assert set(drawn.tolist()) == {2}
    recipe.top_p = 0.9
    drawn = _Sampler(recipe, [request], 1, 1)(torch.zeros(20000, 1, dtype=torch.long), logits).argmax(-1)
    share = np.bincount(drawn.numpy(), minlength=4) / 20000
    e = np.exp([4.0, 2.0])
    np.testing.assert_allclose(share, [e[1] / e.sum(), 0, e[0] / e.sum(), 0], atol=0.01)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_line_and_costs_nothing(recipe: Recipe, tmp_path: Path) -> None:
    tiny.write_jsonl(Path(recipe.prompts), [{"prompt": f"Why is {n} None?"} for n in range(200)])
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(out)], check=False)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    command = ["scripts/generate.py", *flags(output_dir=out, engine="transformers", temperature=1.0)]
    command += flags(model=recipe.model, prompts=recipe.prompts, pairs=3, maxlen=12)
    try:
        done = tiny.run(*command)
        assert done.returncode == 1
        assert "the disk is full; make room and run the same command" in done.stderr
        assert "Traceback" not in done.stderr
        kept = journal_lines(out)
        subprocess.run(["mount", "-o", "remount,size=4m", str(out)], check=True)
        assert f"{kept} in the journal" in tiny.succeed(*command)
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere/at-all"], "the Hub does not give it"),
        (["--model", "./nowhere"], "no such directory"),
        (["--prompts", "nowhere.jsonl"], "no such file"),
        (["--prompt_column", "question"], "Pass --prompt_column"),
    ],
)
def test_bad_input_ends_in_one_line_before_the_model_loads(
    recipe: Recipe, tmp_path: Path, flags: list[str], message: str
) -> None:
    base = ["--model", recipe.model, "--prompts", recipe.prompts, "--output_dir", str(tmp_path / "out")]
    done = tiny.run("scripts/generate.py", *base, *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr

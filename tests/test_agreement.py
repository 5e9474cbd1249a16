"""The engine that draws and the trainer that learns must mean the same policy: measured, kept, and warned about."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import preferences
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch

from sppo import run_sppo
from sppo.models.loading import load_causal_lm
from sppo.models.policy import open_policy
from sppo.schema import AGREEING
from sppo.store.files import read_json
from sppo.training.agreement import describe_agreement, engine_agreement


def worst_difference(responses: Path, model: Path, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference of a token's log-probability, the engine's against a plain forward pass of `model`."""
    network = load_causal_lm(open_policy(str(model)), dtype).eval()
    worst, tokens, of_responses = 0.0, 0, []
    for row in pq.read_table(responses).to_pylist():
        for r in row["responses"]:
            if r["logps"] is not None:
                ids = torch.tensor([row["prompt_token_ids"] + r["token_ids"]])
                with torch.inference_mode():
                    logps = torch.log_softmax(network(input_ids=ids).logits[0, :-1].float(), -1)  # (T - 1, V)
                mine = logps.gather(-1, ids[0, 1:, None])[len(row["prompt_token_ids"]) - 1 :, 0]
                assert len(r["logps"]) == len(mine)
                apart = mine - torch.tensor(r["logps"])
                worst, tokens = max(worst, apart.abs().max().item()), tokens + len(mine)
                of_responses.append(abs(apart.mean().item()))
    assert tokens
    print(f"largest difference {worst:.2g} nats of {tokens} tokens; of responses {np.mean(of_responses):.2g} a token")
    return worst


def generate(model: Path, directory: Path, count: int, *flags: str) -> Path:
    prompts = tiny.write_jsonl(directory / "p.jsonl", [{"prompt": f"Why is {i} None?"} for i in range(count)])
    command = [tiny.sys.executable, "scripts/generate.py", "--model", model, "--prompts", prompts, "--pairs", "2"]
    tiny.succeed(
        *command, "--maxlen", "16", "--temperature", "1.3", "--top_p", "0.8", "--output_dir", directory, *flags
    )
    return directory / "responses.parquet"


def test_a_sample_keeps_the_engines_log_probs(models: Path, tmp_path: Path) -> None:
    """Those of the policy itself, before temperature and top_p, of 32 prompts that no sharding changes."""
    responses = generate(models / "llama3", tmp_path, 40, "--engine", "transformers")
    assert worst_difference(responses, models / "llama3") < 2e-5  # rounded to 1e-5
    kept = [[r["logps"] is not None for r in row["responses"]] for row in pq.read_table(responses).to_pylist()]
    assert all(len(set(row)) == 1 for row in kept)
    assert sum(row[0] for row in kept) == 32


@pytest.mark.slow
def test_vllm_keeps_the_same_log_probs(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    responses = generate(models / "llama3", tmp_path, 6, "--engine", "vllm")
    assert worst_difference(responses, models / "llama3") < 1e-4


class Known:
    """A data set of four responses, of which the first three kept the engine's log-probs."""

    def __init__(self) -> None:
        self.responses = [(np.arange(2), np.arange(4)), (np.arange(10), np.arange(3))]
        self.drawn_logps = np.array([-1.0, -2.0, -5.0, np.nan])


def test_agreement_by_hand() -> None:
    found = engine_agreement(torch.tensor([-1.0, -2.4, -4.0, -99.0]), Known())  # type: ignore[arg-type]
    # apart by 0, 0.4 and -1 over 2, 4 and 10 tokens
    assert found["responses"] == 3
    assert found["tokens"] == 16
    assert found["mean_difference"] == pytest.approx((0 + 0.1 + 0.1) / 3, abs=1e-4)
    assert found["largest_difference"] == pytest.approx(0.1)
    assert found["kl"] == pytest.approx((0 + 0.4 - 1) / 16, abs=1e-4)
    assert "warning" in describe_agreement(found)
    assert "warning" not in describe_agreement({**found, "mean_difference": AGREEING})
    nothing = Known()
    nothing.drawn_logps[:] = np.nan
    assert engine_agreement(torch.zeros(4), nothing) == {}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def responses(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(models / "llama3", tmp_path_factory.mktemp("drawn"), 6, "--engine", "transformers")


def dataset(responses: Path, directory: Path, shift: float) -> Path:
    """Rows whose responses carry the policy's own log-probs, each `shift` off."""
    rows: list[dict[str, Any]] = preferences.rows(6)
    drawn = pq.read_table(responses).to_pylist()
    for row, source in zip(rows, drawn, strict=True):
        for r in source["responses"]:
            r["logps"] = [x + shift for x in r["logps"]]
        for side, index in (("chosen", 0), ("rejected", 1)):
            row[side] = [*source["prompt"], {"role": "assistant", "content": source["responses"][index]["text"]}]
        row.update(source, chosen_index=0, rejected_index=1, probability=[[0.5, 0.9], [0.1, 0.5]])
    out = directory / "train"
    out.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), out / "train.parquet")
    return out


@pytest.mark.parametrize(("shift", "loss_type"), [(0.0, "sppo"), (0.0, "sppo_all"), (0.05, "sppo")])
def test_a_training_measures_it_and_warns(
    models: Path, responses: Path, tmp_path: Path, shift: float, loss_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every reason for a mismatch looks the same: the engine's log-probs are not the trainer's."""
    data = dataset(responses, tmp_path, shift)
    out = tmp_path / "model"
    flags = [f"--model={models / 'llama3'}", f"--dataset={data}", f"--output_dir={out}", f"--loss_type={loss_type}"]
    run_sppo.main([*preferences.SMALL, *flags])
    found = read_json(out / "sppo_manifest.json")["agreement"]
    assert found["responses"] == 12
    assert found["mean_difference"] == pytest.approx(shift, abs=1e-4)
    assert math.isclose(found["kl"], shift, abs_tol=1e-4)
    warned = "warning: the engine that drew the responses and the trainer disagree" in capsys.readouterr().out
    assert warned == bool(shift)

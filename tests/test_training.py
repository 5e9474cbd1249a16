"""One process: the log-probs, the batches, the reference table, the schedule, LoRA, and what a trained model holds."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import preferences
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from sppo import run_sppo
from sppo.command.errors import SPPOError, UsageError
from sppo.method.loss import divergence, preference_loss
from sppo.models import chat
from sppo.models.files import model_identity
from sppo.models.loading import load_causal_lm
from sppo.models.policy import open_policy
from sppo.recipe import Recipe
from sppo.store.files import read_json
from sppo.training.batches import Batches, MicroBatch, MicroBatches, even_parts
from sppo.training.data import TrainingSet, load_training_set
from sppo.training.first_step import loss_at_reference
from sppo.training.logps import add_lean_forward, response_logps
from sppo.training.trainer import SPPOTrainer

Train = Callable[..., Path]
OTHERS = ("sppo_single", "sigmoid", "hinge", "ipo", "ipo_mean", "kto_pair")  # losses beside sppo, of pairs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preferences.write(tmp_path_factory.mktemp("data"), preferences.rows(21))


@pytest.fixture
def train(models: Path, dataset: Path, tmp_path: Path) -> Train:
    """run_sppo.py's main, in this process: `train("name", "--flag=value", model=...)` gives the output directory."""

    def run(name: str, *flags: str, model: str | Path = "llama3", data: Path = dataset) -> Path:
        out = tmp_path / name
        run_sppo.main(
            [*preferences.SMALL, f"--model={models / model}", f"--dataset={data}", f"--output_dir={out}", *flags]
        )
        return out

    return run


def small_set(path: Path, directory: Path, **settings: Any) -> TrainingSet:
    tokenizer = chat.load_tokenizer(directory)
    stops = chat.stop_token_ids(directory, tokenizer)
    recipe = Recipe(max_prompt_length=128, max_length=256, **settings)
    return load_training_set(path / "train.parquet", tokenizer, stops, recipe)


def lean_and_plain(network: Any, data: TrainingSet, rows: list[int], chunks: int, groups: int) -> list[Any]:
    """[(log-probs, gradients by name)] of a loss that weighs each response differently: lean, then plain."""
    batch = Batches(data, pad_id=0, groups=groups).make(MicroBatch(rows))
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    found = []
    for lean in (True, False):
        network.zero_grad()
        if lean:
            split = {k: batch[k] for k in ("groups", "widths")}
            logps = network(**given, positions=batch["positions"], chunks=chunks, **split)
        else:
            logps = response_logps(network(**given).logits, batch["input_ids"], batch["positions"])
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        found.append((logps.detach(), {n: p.grad.clone() for n, p in network.named_parameters()}))
    return found


@pytest.mark.parametrize("family", ["llama3", "gemma2", "mistral", "qwen3"])
def test_lean_log_probs_and_gradients_are_the_plain_ones(models: Path, dataset: Path, family: str) -> None:
    """Gemma-2 has a soft cap on its logits and ties its head; more chunks than tokens, and more groups than responses,
    must work too."""
    network = load_causal_lm(open_policy(str(models / family)), torch.float32)
    assert add_lean_forward(network)
    data = small_set(dataset, models / family)
    shortest = int(data.lengths().argmin())
    for rows, chunks, groups in (([0, 3, 5], 4, 1), ([0, 3, 5], 4, 3), ([shortest], 99, 4)):
        (lean, lean_grads), (plain, plain_grads) = lean_and_plain(network, data, rows, chunks, groups)
        torch.testing.assert_close(lean, plain, rtol=1e-6, atol=1e-4)
        for name, grad in plain_grads.items():
            assert (lean_grads[name] - grad).norm() <= 2e-6 * grad.norm(), name


@pytest.mark.parametrize("what", ["behind its backbone", "before its backbone"])
def test_what_a_network_does_around_its_backbone(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """The lean log-probs have what it does behind; for what it does before, they fall back to the plain ones, aloud.
    Else training would be on another model's log-probs."""
    from transformers import LlamaForCausalLM

    own = LlamaForCausalLM.forward

    def halved(self: Any, *args: Any, **kwargs: Any) -> Any:
        if what == "before its backbone":
            kwargs["inputs_embeds"] = self.get_input_embeddings()(kwargs.pop("input_ids")) / 2
        output = own(self, *args, **kwargs)
        if what == "behind its backbone":
            output.logits = output.logits / 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", halved)
    model = train("halved", data=preferences.write(tmp_path / "data", preferences.rows(8)))
    falls_back = "log-probs come from full logits" in capsys.readouterr().out
    assert falls_back == (what == "before its backbone")
    assert preferences.metrics(model)[0]["rewards/chosen"] == 0


def test_batches_hold_each_row_once_and_the_same_steps_for_any_number_of_ranks() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 203)

    def steps(ranks: int, batch: int, accumulate: int, epoch: int, group: bool = True) -> list[list[list[int]]]:
        """[step][micro-batch][row], all ranks' micro-batches together; a row that does not count is left out."""
        all_ranks = []
        for rank in range(ranks):
            sampler = MicroBatches(lengths, batch, accumulate, 7, ranks, rank, group)
            sampler.set_epoch(epoch)
            all_ranks.append(list(sampler))
            assert len(all_ranks[-1]) == len(sampler)
        made = []
        for s in range(len(all_ranks[0]) // accumulate):
            micro = [b for rank in all_ranks for b in rank[s * accumulate : (s + 1) * accumulate]]
            counted = [b.rows if b.counted else [] for b in micro]
            assert all(b.step_rows == sum(map(len, counted)) for b in micro)
            assert all(b.rows for b in micro)  # every rank always has something to do, or the others wait for ever
            made.append(counted)
        return made

    one, eight = steps(1, 4, 16, 0), steps(8, 8, 1, 0)
    assert sorted(i for s in one for b in s for i in b) == list(range(203))
    assert [sorted(i for b in s for i in b) for s in one] == [sorted(i for b in s for i in b) for s in eight]
    assert steps(1, 4, 16, 0) == one
    assert steps(1, 4, 16, 1) != one
    random = steps(1, 4, 16, 0, group=False)
    assert [sorted(i for b in s for i in b) for s in random] == [sorted(i for b in s for i in b) for s in one]

    def padded(made: list[list[list[int]]]) -> float:
        return sum(len(b) * lengths[b].max() for s in made for b in s if b) / lengths.sum()

    assert padded(one) < 1.1 < 1.4 < padded(random)


def test_the_parts_of_a_batch_are_as_even_as_can_be() -> None:
    """Rows times the first one's length; none is empty as long as there are rows."""
    lengths = np.array([900, 400, 390, 200, 100, 100, 100, 90, 50])
    assert even_parts(lengths, 3) == [range(0, 1), range(1, 4), range(4, 9)]  # 900, 1200, 500
    assert even_parts(lengths[:2], 4) == [range(0, 1), range(1, 2), range(0), range(0)]
    for count in range(1, 12):
        parts = even_parts(lengths, count)
        assert [i for part in parts for i in part] == list(range(9))
        assert len(parts) == count
        assert sum(len(part) > 0 for part in parts) == min(count, 9)


def test_an_anchor_pulls_back(
    models: Path, dataset: Path, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a preference the anchored step goes a share A of the way to the anchor's log-ratios, and nothing else."""
    first = tiny.lora(models / "llama3", tmp_path / "first")
    rows = preferences.rows(12)
    for row in rows:
        row |= {"chosen_probs": 0.5, "chosen_probs_win": 0.5, "chosen_probs_lose": 0.5}
    data = preferences.write(tmp_path / "data", rows)
    flags = ["--anchor=0.5", f"--anchor_model={first}", "--num_train_epochs=30", "--learning_rate=3e-4"]
    model = train("anchored", *flags, "--beta=1", data=data)
    shown = capsys.readouterr().out
    assert "the anchor's log-probs are kept in" in shown
    losses = [line["loss"] for line in preferences.metrics(model)]
    assert first_loss(shown) == pytest.approx(losses[0], rel=1e-3)  # the pull is in it: with win rates of 1/2 all of it
    assert losses[-1] < 0.1 * losses[0]
    manifest = read_json(model / "sppo_manifest.json")
    assert manifest["settings"]["anchor"] == 0.5
    assert manifest["inputs"]["anchor"] == open_policy(str(first)).identity()
    at_home = train("at_home", "--anchor=0.5", f"--anchor_model={models / 'llama3'}", data=data)
    assert "found the anchor's log-probs" in capsys.readouterr().out  # the policy itself: its reference's
    assert preferences.metrics(at_home)[0]["loss"] < 1e-6  # nothing pulls
    with pytest.raises(UsageError, match="needs --anchor_model"):
        train("nowhere", "--anchor=0.5")
    with pytest.raises(UsageError, match="sppo and sppo_all, not ipo"):
        train("ipo", "--anchor=0.5", "--loss_type=ipo", f"--anchor_model={first}")


@pytest.mark.parametrize(("reg", "at_home"), [("reverse", 0), ("forward", 2), ("both", 2)])
def test_a_divergence_holds_the_policy_back(
    models: Path, dataset: Path, tmp_path: Path, train: Train, reg: str, at_home: float
) -> None:
    """In iteration 1 the anchor is the policy itself, so at its first step d is 0. Far from the anchor, and without a
    preference, SPPO's loss alone is at its minimum; with --reg the policy goes nearer."""
    flags = [f"--reg={reg}", "--reg_coef=0.5", "--num_train_epochs=1", "--loss_type=sppo_all"]
    held = train("held", *flags, f"--anchor_model={models / 'llama3'}")
    free = train("free", "--num_train_epochs=1", "--loss_type=sppo_all")
    (first, *_, last), lines = preferences.metrics(held), preferences.metrics(free)
    assert first["divergence"] == pytest.approx(at_home, abs=1e-5)
    assert first["loss"] == pytest.approx(lines[0]["loss"] + 0.5 * at_home, rel=1e-5)
    assert "divergence" not in lines[0]
    manifest = read_json(held / "sppo_manifest.json")
    assert (manifest["settings"]["reg"], manifest["settings"]["reg_coef"]) == (reg, 0.5)
    assert manifest["inputs"]["anchor"] == open_policy(str(models / "llama3")).identity()
    assert manifest["divergence"] == last["divergence"]
    card = (held / "README.md").read_text()
    assert f"| reg | {reg} |" in card
    assert "| divergence | " in card
    assert "It is pulled towards llama3 by RSPO (arXiv 2503.00030)." in card
    assert "pulled towards" not in (free / "README.md").read_text()
    assert not {"reg", "reg_coef"} & read_json(free / "sppo_manifest.json")["settings"].keys()  # as in older runs

    anchor = tiny.lora(models / "llama3", tmp_path / "anchor")
    rows = preferences.rows(12)
    for row in rows:
        row |= {"chosen_probs": 0.5, "chosen_probs_win": 0.5, "chosen_probs_lose": 0.5}
    data = preferences.write(tmp_path / "data", rows)
    flags = [f"--reg={reg}", "--reg_coef=5", "--num_train_epochs=8", "--learning_rate=3e-4", "--beta=1"]
    lines = preferences.metrics(train("far", *flags, f"--anchor_model={anchor}", data=data))
    assert lines[0]["divergence"] > at_home + 0.1
    assert lines[-1]["divergence"] < 0.9 * lines[0]["divergence"]


def test_the_anchors_network_is_gone_before_the_first_step(
    models: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stayed for the whole training, beside what the preflight counts: 28 GB of a 7B model on each GPU."""
    loaded: list[Any] = []
    compute_loss = SPPOTrainer.compute_loss

    def load(*args: Any) -> Any:
        network = load_causal_lm(*args)
        loaded.append(weakref.ref(network))
        return network

    def at_a_step(self: SPPOTrainer, *args: Any, **kwargs: Any) -> Any:
        assert [ref() for ref in loaded] == [None]
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr("sppo.training.reference.load_causal_lm", load)
    monkeypatch.setattr(SPPOTrainer, "compute_loss", at_a_step)
    anchor = tiny.lora(models / "llama3", tmp_path / "anchor")
    gc.disable()  # the collector alone would come too late, in a long training
    try:
        train("held", "--reg=reverse", "--reg_coef=0.5", f"--anchor_model={anchor}")
    finally:
        gc.enable()


def test_an_adapter_as_anchor_is_read_as_the_policy_is(
    models: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge rounds to bfloat16. An anchor that was merged and a policy that was not were apart at the start of
    iteration 2, though the two are one model where nothing is learned."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    base = tmp_path / "base"
    shutil.copytree(models / "llama3", base)
    load_causal_lm(open_policy(str(models / "llama3")), torch.bfloat16).save_pretrained(base)
    first = tiny.lora(base, tmp_path / "first")
    weights = load_file(first / "adapter_model.safetensors")
    larger = {name: (10 * x if "lora_B" in name else x).contiguous() for name, x in weights.items()}
    save_file(larger, first / "adapter_model.safetensors", metadata={"format": "pt"})

    flags = ["--use_peft=true", "--reg=reverse", "--reg_coef=0.5", f"--anchor_model={first}", "--learning_rate=0"]
    one = train("iter1", *flags, model=first)
    other = preferences.write(tmp_path / "other", preferences.rows(16, seed=1))
    two = train("iter2", *flags, model=one, data=other)
    assert [line["divergence"] for line in preferences.metrics(two)] == pytest.approx([0, 0], abs=1e-4)


def test_a_first_model_that_changes_in_the_middle_of_a_run_is_refused(
    models: Path, dataset: Path, tmp_path: Path
) -> None:
    """The second iteration was pulled towards another model than the first, without a word."""
    run, first = tmp_path / "run", tmp_path / "first"
    shutil.copytree(models / "llama3", first)

    def train(number: int) -> None:
        own = {"iteration": number, "model_dir": str(run / f"iter{number}" / "model"), "run_dir": str(run)}
        own |= {"model": str(first), "anchor_model": str(first), "dataset": str(dataset), "reg": "reverse"}
        path = run / f"iter{number}" / "recipe.yaml"
        path.parent.mkdir(parents=True)
        recipe = Recipe(**own, reg_coef=0.5, global_batch_size=8, batch_size=4)
        path.write_text(json.dumps(dataclasses.asdict(recipe)))
        run_sppo.main([f"--recipe={path}"])

    train(1)
    train(2)
    weights = load_file(first / "model.safetensors")
    save_file({name: 1.02 * x for name, x in weights.items()}, first / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SPPOError, match="has changed since iteration 1"):
        train(3)


def test_a_weight_of_0_trains_to_the_same_bits(models: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, because it would do nothing. That it would do nothing is what this shows."""
    monkeypatch.setattr("sppo.training.settings._require_anchor", lambda _: None)
    free = train("free")
    for reg in ("reverse", "forward", "both"):
        held = train(reg, f"--reg={reg}", "--reg_coef=0", f"--anchor_model={models / 'llama3'}")
        assert [line["loss"] for line in preferences.metrics(held)] == [x["loss"] for x in preferences.metrics(free)]
        one, other = (load_file(d / "model.safetensors") for d in (free, held))
        assert all(one[name].equal(other[name]) for name in one)


def test_ipo_mean_is_ipo_over_tokens(models: Path, tmp_path: Path, train: Train) -> None:
    """Where all responses have n tokens, ipo with beta / n has n^2 times the loss of ipo_mean with beta."""
    tokenizer = chat.load_tokenizer(models / "llama3")
    by_length: dict[int, list[str]] = {}
    for row in preferences.rows(60):
        text = row["chosen"][-1]["content"]
        by_length.setdefault(len(tokenizer(text)["input_ids"]), []).append(text)
    texts = max(by_length.values(), key=len)
    rows = preferences.rows(8)
    for number, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            row[side][-1]["content"] = texts[(number + (side == "chosen")) % len(texts)]
    data = preferences.write(tmp_path / "data", rows)
    (n,) = {len(response) for row in small_set(data, models / "llama3").responses for response in row}
    assert len(texts) > 1

    flags = ("--num_train_epochs=4", "--learning_rate=1e-4")
    mean = preferences.metrics(train("mean", "--loss_type=ipo_mean", "--beta=0.5", *flags, data=data))
    total = preferences.metrics(train("sum", "--loss_type=ipo", f"--beta={0.5 / n}", *flags, data=data))
    assert mean[-1]["loss"] < 0.99 * mean[0]["loss"]
    for one, other in zip(mean, total, strict=True):
        assert other["loss"] == pytest.approx(n**2 * one["loss"], rel=1e-3)


@dataclass
class Trained:
    """A policy and a data set that has the table of this policy's log-probs beside it."""

    policy: Path
    data: Path

    def tables(self) -> list[Path]:
        return sorted((self.data / "reference").iterdir())


@pytest.fixture(scope="module")
def trained_once(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One training, whose table is found or not found by the trainings of the tests below."""
    directory = tmp_path_factory.mktemp("once")
    made = Trained(tiny.llama3(directory / "policy"), preferences.write(directory / "data", preferences.rows(9)))
    flags = [f"--model={made.policy}", f"--dataset={made.data}", f"--output_dir={directory / 'model'}"]
    run_sppo.main([*preferences.SMALL, *flags])
    assert len(made.tables()) == 1
    return made


@pytest.fixture
def trained(trained_once: Trained, tmp_path: Path) -> Trained:
    """A copy that a test may change."""
    policy = shutil.copytree(trained_once.policy, tmp_path / "policy")
    return Trained(policy, shutil.copytree(trained_once.data, tmp_path / "data"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--beta=0.01", "--loss_type=ipo"),
        ("--max_length=400",),  # cuts as little as before: the same token ids
    ],
)
def test_the_reference_is_computed_once(
    trained: Trained, train: Train, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    """Another loss, or another limit that cuts the same tokens, reads the table of the first training."""
    train("again", *flags, model=trained.policy, data=trained.data)
    assert "found the reference's log-probs" in capsys.readouterr().out
    assert len(trained.tables()) == 1


def test_the_reference_of_other_weights_is_another_table(trained: Trained, train: Train) -> None:
    """At the first step the policy is its reference, so its reward is 0; with the first weights' table it is not."""
    path = trained.policy / "model.safetensors"
    save_file({k: v * 1.01 for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    model = train("other_weights", model=trained.policy, data=trained.data)
    assert preferences.metrics(model)[0]["rewards/chosen"] == 0
    assert len(trained.tables()) == 2


def test_the_reference_of_other_token_ids_is_another_table(trained: Trained, train: Train) -> None:
    cut = ("--max_length=50", "--max_prompt_length=40")
    train("cut", *cut, model=trained.policy, data=trained.data)
    assert len(trained.tables()) == 2


def test_a_damaged_table_of_the_reference_is_made_again(trained: Trained, train: Train) -> None:
    (table,) = trained.tables()
    whole = load_file(table)["logps"].clone()  # which was mapped from the file
    assert len(whole) == 18  # 9 pairs
    table.write_bytes(b"half a file")
    train("again", model=trained.policy, data=trained.data)
    assert load_file(table)["logps"].equal(whole)


def test_the_reference_is_the_plain_log_prob_of_every_response(models: Path, dataset: Path, train: Train) -> None:
    train("run", "--loss_type=sppo_all", model="qwen3")
    data = small_set(dataset, models / "qwen3", loss_type="sppo_all")
    network = load_causal_lm(open_policy(str(models / "qwen3")), torch.float32)
    tables = [load_file(f)["logps"] for f in (dataset / "reference").iterdir()]
    (table,) = [t for t in tables if len(t) == 63 and abs(t[0] - plain(network, data, 0)[0]) < 1e-2]
    for row in range(21):
        torch.testing.assert_close(table[3 * row : 3 * row + 3], plain(network, data, row), rtol=1e-5, atol=1e-3)


@torch.no_grad()
def plain(network: Any, data: TrainingSet, row: int) -> torch.Tensor:
    """Log-probs of a row's responses, one by one and without padding."""
    made = []
    for prompt, response in zip(data.prompts[row], data.responses[row], strict=True):
        ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        logps = network(input_ids=ids).logits[0, :-1].log_softmax(-1)
        made.append(logps[range(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]].sum())
    return torch.stack(made)


def test_a_data_directory_that_takes_no_table_leaves_it_with_the_run(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    data = preferences.write(tmp_path / "data", preferences.rows(4))
    (data / "reference").write_text("in the way")
    train("run", data=data)
    assert "cannot be kept in" in capsys.readouterr().out


@pytest.mark.parametrize(("recipe", "epochs", "last"), [("paper", 18, 2.8e-7), ("paper-llama-3", 6, 4.63e-7)])
def test_the_schedule_is_laid_out_over_the_published_models_horizon(
    dataset: Path, train: Train, recipe: str, epochs: int, last: float
) -> None:
    """One epoch is trained. 10% of 18 is warm-up, so the rate climbs to 1 / 1.8 of 5e-7; 10% of 6 is over before."""
    flags = [f"--recipe=recipes/sppo/{recipe}.yaml", "--learning_rate=5e-7", "--global_batch_size=1", "--batch_size=1"]
    lines = preferences.metrics(train("run", *flags, "--gradient_checkpointing=false"))
    assert len(lines) == 21
    steps, warm_up = epochs * 21, math.ceil(0.1 * epochs * 21)
    rates = [min(s / warm_up, (steps - s) / (steps - warm_up)) for s in range(22)]
    assert [line["learning_rate"] for line in lines] == pytest.approx([5e-7 * rate for rate in rates[:21]])
    assert 5e-7 * rates[21] == pytest.approx(last, rel=0.02)


def test_gradients_are_not_clipped_unless_asked(models: Path, train: Train) -> None:
    """One step of plain SGD moves by rate x gradient, however large that is; clipped at 1 it moves by the rate."""
    for name, flags, factor in (("free", [], None), ("clipped", ["--max_grad_norm=1"], 1.0)):
        model = train(name, "--optim=sgd", "--learning_rate=1e-5", "--global_batch_size=24", "--batch_size=8", *flags)
        before, after = (load_file(d / "model.safetensors") for d in (models / "llama3", model))
        moved = math.sqrt(sum((after[k].double() - before[k].double()).square().sum().item() for k in before))
        (line,) = preferences.metrics(model)
        assert line["grad_norm"] > 20
        assert moved == pytest.approx(1e-5 * (factor or line["grad_norm"]), rel=2e-2)


@pytest.mark.parametrize(
    ("rate", "said"),
    [("1e30", r"step 2: the loss is (nan|inf)"), ("1e38", "step 1: .* has weights that are not finite")],
)
def test_a_training_that_diverges_ends_and_makes_nothing_of_it(
    tmp_path: Path, train: Train, rate: str, said: str
) -> None:
    """Not a model of NaN that the next iteration draws from, hours later, nor a checkpoint in a good one's place."""
    with pytest.raises(SPPOError, match=f"{said}. Lower --learning_rate, or clip"):
        train("x", "--optim=sgd", f"--learning_rate={rate}", "--save_steps=1", "--warmup_ratio=0")
    assert not (tmp_path / "x").exists()
    saved = [path.parent.name for path in (tmp_path / "x.partial").glob("checkpoint-*/complete.json")]
    assert saved == (["checkpoint-1"] if rate == "1e30" else [])


def test_what_a_trained_model_holds(models: Path, tmp_path: Path, train: Train) -> None:
    model = train("model", "--iter=2", "--logging_steps=2", "--save_steps=1000", model="gemma2")
    before, after = (load_file(d / "model.safetensors") for d in (models / "gemma2", model))
    assert before.keys() == after.keys()
    assert not [name for name in before if before[name].equal(after[name])]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (model / name).read_bytes() == (models / "gemma2" / name).read_bytes()
    lines = preferences.metrics(model)
    assert [line["step"] for line in lines] == [2, 3]
    assert lines[0]["beta2_loss"] == pytest.approx(0.01 * lines[0]["loss"])
    assert {"rewards/accuracies", "rewards/chosen_target", "tokens_per_second", "seconds_left"} <= lines[0].keys()
    manifest = read_json(model / "sppo_manifest.json")
    assert manifest["loss"] == pytest.approx((2 * lines[0]["loss"] + lines[1]["loss"]) / 3)
    card = (model / "README.md").read_text()
    for said in ("from gemma2", "iteration 2", "train.parquet", "| rows | 21 |", "| beta | 0.1 |", "| torch | 2."):
        assert said in card
    assert str(models) not in card
    assert not list(model.rglob("*.bin"))
    assert not list(model.rglob("optimizer*"))
    assert not (tmp_path / "model.partial").exists()
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode & 0o777 for path in model.iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}  # safetensors' own is 0600: colleagues read it too


def test_a_policy_in_bfloat16_is_trained_in_float32_and_stays_one(models: Path, tmp_path: Path, train: Train) -> None:
    tiny.mistral(tmp_path / "policy")
    network = load_causal_lm(open_policy(str(tmp_path / "policy")), torch.bfloat16)
    network.save_pretrained(tmp_path / "policy")
    weights = load_file(train("model", model=tmp_path / "policy") / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}


def test_all_responses_are_trained_on_with_their_own_win_rates(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the first step the loss is eta^2 times the mean over rows of (1/K) sum_i (P_i - 1/2)^2, by hand."""
    made = preferences.rows(8, pairs=4)
    for empty in (0, 2):
        made[0]["responses"][empty]["text"] = " "
    for response in made[1]["responses"]:
        response["text"] = ""
    data = preferences.write(tmp_path / "data", made)
    model = train("model", "--loss_type=sppo_all", "--max_grad_norm=0.01", data=data)
    counts = read_json(model / "sppo_manifest.json")["counts"]
    assert counts["empty_responses_left_out"] == 6
    assert counts["rows_without_a_response"] == 1
    assert counts["rows"] == 7
    squares = [[(sum(line) / 4 - 0.5) ** 2 for line in row["probability"]] for row in made]
    means = [(squares[0][1] + squares[0][3]) / 2] + [sum(s) / 4 for s in squares[2:]]
    (line,) = preferences.metrics(model)
    assert line["loss"] == pytest.approx(100 * sum(means) / 7, rel=1e-4)
    assert first_loss(capsys.readouterr().out) == pytest.approx(line["loss"], rel=1e-4)
    bare = [{k: v for k, v in row.items() if k != "probability"} for row in made]
    with pytest.raises(SPPOError, match="no column probability: --loss_type sppo_all"):
        train("bare", "--loss_type=sppo_all", data=preferences.write(tmp_path / "data1", bare))
    made[3]["probability"][0] = [0.5]
    with pytest.raises(SPPOError, match="row 3: 4 responses, and a probability that is not 4 x 4"):
        train("ragged", "--loss_type=sppo_all", data=preferences.write(tmp_path / "data2", made))


def first_loss(shown: str) -> float:
    """The loss of the first step that a training's log names, once."""
    ((loss, _),) = re.findall(r"at the first step the loss must be near (\S+) \(beta2_loss (\S+)\)", shown)
    return float(loss)


def test_the_first_loss_is_the_papers_formula(
    dataset: Path, train: Train, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """eta^2 mean((p_win - 1/2)^2 + (p_lose - 1/2)^2) / 2, in the log's first line: nobody takes 60,000 for a fault.

    It is that of the first step's own rows, which here are all. A training that goes on from a checkpoint has none.
    """
    flags = ["--beta=0.001", "--global_batch_size=24", "--num_train_epochs=2", "--save_steps=1"]
    rates = [(row["chosen_probs_win"], row["chosen_probs_lose"]) for row in preferences.rows(21)]
    expected = 1e6 * sum((win - 0.5) ** 2 + (lose - 0.5) ** 2 for win, lose in rates) / 2 / 21
    (line, _) = preferences.metrics(train("model", *flags))
    shown = capsys.readouterr().out
    named = next(text for text in shown.splitlines() if text.startswith("train: {"))
    assert first_loss(named) == pytest.approx(expected, rel=1e-5)
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert f"(beta2_loss {line['beta2_loss']:.4g}" in named
    assert "warning" not in shown


@pytest.mark.parametrize("loss_type", ["sppo", *sorted(OTHERS)])
def test_rounding_at_the_first_step_is_never_worth_a_warning(loss_type: str) -> None:
    """However it falls, it brings the loss no further than what the warning allows; for sppo to the last bit of it."""
    draw = torch.Generator().manual_seed(0)
    rates, furthest = torch.rand(3, 8, generator=draw), 3 * torch.rand(16, generator=draw)
    rates[:, 0] = 0.5  # a row that asks for nothing
    for beta, smoothing in ((1e-3, 0.0), (0.1, 0.5 if loss_type == "sigmoid" else 0.0)):

        def losses(ratios: torch.Tensor) -> torch.Tensor:
            return preference_loss(loss_type, ratios[::2], ratios[1::2], beta, *rates, smoothing)  # noqa: B023

        loss, rounding = loss_at_reference(losses, furthest)
        signs = torch.randint(0, 2, (300, 16), generator=draw) * 2 - 1
        apart = [(losses(furthest * sides).double().mean() - loss).abs().item() for sides in signs]
        assert 0 < max(apart) <= rounding + 1e-6 * loss
    a, b = torch.tensor([0.3]), torch.tensor([-0.2])  # by hand, 1 nat each: (301^2 + 201^2) / 2 - (300^2 + 200^2) / 2

    def of_one(ratios: torch.Tensor) -> torch.Tensor:
        return preference_loss("sppo", ratios[:1], ratios[1:], 1e-3, a, 0.5 + a, 0.5 + b)

    assert loss_at_reference(of_one, torch.ones(2)) == pytest.approx((65000, 501), rel=1e-4)


def test_rounding_where_the_forward_kl_is_clipped_is_never_worth_a_warning() -> None:
    """d is -9.9, and R is 10: a nat less likely it grows by e^10 - e^9.9, a nat likelier it falls by e^9.9 - e^8.9."""
    row = torch.zeros(2, dtype=torch.long)

    def losses(ratios: torch.Tensor) -> torch.Tensor:
        return divergence("forward", ratios - 9.9, row, 1)

    loss, rounding = loss_at_reference(losses, torch.ones(2))
    assert loss == pytest.approx(2 * math.exp(9.9))
    assert rounding == pytest.approx(2 * (math.exp(9.9) - math.exp(8.9)))


@pytest.mark.parametrize("loss_type", sorted(OTHERS))
def test_every_loss_trains(train: Train, capsys: pytest.CaptureFixture[str], loss_type: str) -> None:
    flags = ["--label_smoothing=0.1"] if loss_type == "sigmoid" else []
    lines = preferences.metrics(train("model", f"--loss_type={loss_type}", "--num_train_epochs=2", *flags))
    shown = capsys.readouterr().out
    assert first_loss(shown) == pytest.approx(lines[0]["loss"], rel=1e-4)
    assert "warning" not in shown
    assert len(lines) == 6
    assert all(math.isfinite(line["loss"]) for line in lines)
    first = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0, "ipo_mean": 25.0, "kto_pair": 0.5}.get(loss_type)
    assert first is None or lines[0]["loss"] == pytest.approx(first, rel=1e-3)


@pytest.mark.slow
def test_lora_and_the_next_iteration_from_it(models: Path, dataset: Path, tmp_path: Path, train: Train) -> None:
    """Iteration 2's reference is iteration 1's policy, the adapter with it, and not the base."""
    lora = ["--use_peft", "--lora_r=4", "--lora_target_modules=q_proj,v_proj,down_proj", "--learning_rate=2e-2"]
    one = train("one", *lora, "--merge_adapter", "--num_train_epochs=3", "--save_steps=2")
    assert preferences.metrics(one)[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    adapter = load_file(one / "adapter_model.safetensors")
    assert not (one / "model.safetensors").exists()
    assert all(w.abs().sum() > 0 for w in adapter.values())  # every parameter that is trained moved
    policy = open_policy(str(one))
    assert policy.weights == (models / "llama3").resolve()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for place in (one, one / "merged"):
            assert (place / name).read_bytes() == (models / "llama3" / name).read_bytes()

    data = small_set(dataset, one)
    merged, base = (load_causal_lm(open_policy(str(d)), torch.float32) for d in (one / "merged", models / "llama3"))
    two = train("two", *lora, model=one)
    first = preferences.metrics(two)[0]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    table = reference_of(dataset, 42, plain(merged, data, 0)[0])
    for row in range(21):
        torch.testing.assert_close(table[2 * row : 2 * row + 2], plain(merged, data, row), rtol=1e-4, atol=1e-2)
    assert (plain(base, data, 0) - plain(merged, data, 0)).abs().max() > 0.5  # it would be seen
    assert model_identity(one) != model_identity(two)
    changed = load_file(two / "adapter_model.safetensors")
    assert not [k for k in adapter if adapter[k].equal(changed[k])]
    assert open_policy(str(two)).weights == (models / "llama3").resolve()

    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Name a river."}])
    tiny.succeed(
        "scripts/generate.py", "--recipe", "recipes/sppo/demo.yaml", "--model", one, "--prompts", prompts, "--pairs",
        "2", "--maxlen", "8", "--output_dir", tmp_path / "generated", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip


def reference_of(dataset: Path, size: int, first: torch.Tensor) -> torch.Tensor:
    tables = [load_file(f)["logps"] for f in (dataset / "reference").iterdir()]
    (table,) = [t for t in tables if len(t) == size and abs(t[0] - first) < 1e-2]
    return table


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load_in_4bit"], "goes with --use_peft"),
        (["--merge_adapter"], "goes with --use_peft"),
        (["--use_peft", "--load_in_4bit"], "needs a GPU and bitsandbytes"),
        (["--label_smoothing=0.1"], "is for --loss_type sigmoid"),
        (["--label_smoothing=0.7", "--loss_type=sigmoid"], "between 0 and 0.5"),
        (["--report_to=wandb"], "not installed; pip install wandb"),
        (["--global_batch_size=7"], "not a multiple"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(
    models: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    arguments = [f"--model={models / 'llama3'}", f"--dataset={dataset}", f"--output_dir={tmp_path / 'out'}"]
    monkeypatch.setattr("sppo.training.train.make_trainer", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match=message):
        run_sppo.main([*preferences.SMALL, *arguments, *flags])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", ["q_proj", "q_proj, v_proj"])
def test_an_adapter_is_put_on_the_modules_that_are_named(train: Train, names: str) -> None:
    model = train("out", "--use_peft", f"--lora_target_modules={names}")
    weights = load_file(model / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in weights} == set(names.split(", "))


def test_modules_that_are_not_there_are_an_error(train: Train) -> None:
    with pytest.raises(SPPOError, match="--lora_target_modules nonsense"):
        train("out", "--use_peft", "--lora_target_modules=nonsense")


@pytest.mark.slow
def test_tensorboard_has_a_directory_for_each_model(
    models: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)  # of the trainings before it in this process
    out = tmp_path / "model"
    words = [f"--model={models / 'llama3'}", f"--dataset={dataset}", f"--output_dir={out}", "--report_to=tensorboard"]
    tiny.succeed("sppo/run_sppo.py", *preferences.SMALL, *words)
    assert list((tmp_path / "logs" / "tensorboard").rglob("events*"))
    assert preferences.metrics(out)

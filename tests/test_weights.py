"""What a model's directory is and what of it is read; adapters; stops, and the first step, of a training."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import preferences
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from sppo import cli, iterations, rankers, run_sppo
from sppo.command import stopping
from sppo.command.errors import INTERRUPTED, SPPOError, _terminated
from sppo.evaluation.suites import open_llm
from sppo.generation.engines import Request, vllm
from sppo.generation.engines import transformers as engine
from sppo.models.files import is_adapter, model_identity, weight_shapes
from sppo.models.loading import load_causal_lm
from sppo.models.policy import open_policy
from sppo.models.vllm import check_vllm
from sppo.plan import driver_parser
from sppo.preflight import verdict
from sppo.rankers import reward_model
from sppo.recipe import Recipe
from sppo.training import reference, train
from sppo.training.first_step import FirstLoss, FirstStep
from sppo.training.logps import Forward
from sppo.training.network import disable_noise

IDS = torch.arange(5, 300)[None]  # (1, 295): most of the vocabulary


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preferences.write(tmp_path_factory.mktemp("data"), preferences.rows(21))


@pytest.fixture
def both(models: Path, tmp_path: Path) -> Path:
    """A model and an adapter in one directory."""
    shutil.copytree(models / "llama3", tmp_path / "both")
    for path in tiny.lora(models / "llama3", tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(path, tmp_path / "both")
    return tmp_path / "both"


def run_training(model: Path, data: Path, out: Path, *flags: str) -> Path:
    """run_sppo.py's main in this process; the model."""
    run_sppo.main([*preferences.SMALL, f"--model={model}", f"--dataset={data}", f"--output_dir={out}", *flags])
    return out


def logits(model: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_causal_lm(open_policy(str(model)), torch.float32)(input_ids=IDS).logits


# What a directory is


def test_a_model_and_an_adapter_in_one_directory_are_refused_wherever_it_is_named(
    models: Path, dataset: Path, both: Path, tmp_path: Path
) -> None:
    """transformers puts the adapter on the model without a word, and vLLM does not."""
    said = r"holds a model and an adapter's files too \(adapter_config.json, adapter_model.safetensors\).*Move the"
    with pytest.raises(SPPOError, match=said):
        run_training(both, dataset, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    on_it = tmp_path / "on_it"  # as an adapter's base
    shutil.copytree(tmp_path / "adapter", on_it)
    tiny.edit_json(on_it / "adapter_config.json", base_model_name_or_path=str(both))
    with pytest.raises(SPPOError, match=f"base model {both} {said}"):
        open_policy(str(on_it), weights=False)
    with pytest.raises(SPPOError, match=f"ranker {both} {said}"):
        reward_model.fetch(Recipe(ranker=str(both)))
    for path in both.glob("adapter_*"):  # as the message says
        path.unlink()
    assert logits(both).equal(logits(models / "llama3"))


def test_an_adapter_with_its_bases_config_beside_it_is_an_adapter(models: Path, tmp_path: Path) -> None:
    """As some trainers leave it. It holds no model's weights, so it is clear what is meant."""
    adapter = tiny.lora(models / "llama3", tmp_path / "adapter")
    alone = logits(adapter)
    shutil.copy(models / "llama3" / "config.json", adapter)
    assert open_policy(str(adapter)).weights == models / "llama3"
    assert logits(adapter).equal(alone)
    assert (alone - logits(models / "llama3")).abs().max() > 0.1


def rename(old: str, new: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / old).rename(directory / new)


def write_index(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory / "other.safetensors")
    index = {"weight_map": dict.fromkeys(weight_shapes(directory), "other.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_index_of_a_list(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["other.safetensors"]}))


def lose(name: str) -> Callable[[Path], Any]:
    """As in a damaged cache of the Hub, whose snapshots are links."""

    def change(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to("../../blobs/gone")

    return change


def other_kind(directory: Path) -> None:
    tiny.edit_json(directory / "adapter_config.json", peft_type="IA3")


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("model", rename("model.safetensors", "unrelated.safetensors"), "no model.safetensors in it .pickled weights"),
        ("adapter", rename("adapter_model.safetensors", "unrelated.safetensors"), "no adapter_model.safetensors in it"),
        ("model", write_index, "transformers reads the first, vLLM the others"),
        ("adapter", other_kind, "is of the kind IA3, and only LoRA is read"),
        ("model", write_index_of_a_list, r"model.safetensors.index.json is damaged: its weight_map names no files"),
        ("model", lose("model.safetensors"), "its model.safetensors is a link to a file that is gone; fetch the model"),
        (
            "adapter",
            lose("adapter_model.safetensors"),
            "its adapter_model.safetensors is a link to a file that is gone",
        ),
    ],
    ids=[
        *("pickled model", "pickled adapter", "two sets of weights", "another kind of adapter"),
        *("an index that is none", "a lost model", "a lost adapter"),
    ],
)
def test_what_would_be_read_otherwise_than_it_is_known_is_refused(
    models: Path, tmp_path: Path, kind: str, change: Callable[[Path], Any], said: str
) -> None:
    """Beside any .safetensors, peft would read adapter_model.bin, and a change of it would not be noticed."""
    directory = tmp_path / kind
    if kind == "adapter":
        tiny.lora(models / "llama3", directory)
    else:
        shutil.copytree(models / "llama3", directory)
    change(directory)
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    (directory / "adapter_model.bin" if kind == "adapter" else directory / "unrelated.bin").write_bytes(b"a pickle")
    with pytest.raises(SPPOError, match=said):
        open_policy(str(directory))


def test_an_adapter_on_an_adapter_is_refused(models: Path, tmp_path: Path) -> None:
    tiny.lora(models / "llama3", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    tiny.edit_json(tmp_path / "two" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "one"))
    with pytest.raises(SPPOError, match="its base model .*one is an adapter too; merge it"):
        open_policy(str(tmp_path / "two"))


def test_a_model_is_known_by_all_weights_that_are_read(models: Path, tmp_path: Path) -> None:
    """Those that its index names, wherever they are; it is a model by its index, too."""
    directory = tmp_path / "model"
    shutil.copytree(models / "llama3", directory)
    weights = load_file(directory / "model.safetensors")
    (directory / "parts").mkdir()
    (directory / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "parts/one.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(weights, directory / "parts" / "one.safetensors", {"format": "pt"})
    assert not is_adapter(directory)
    assert logits(directory).equal(logits(models / "llama3"))
    before = model_identity(directory)
    save_file({k: w + 1 for k, w in weights.items()}, directory / "parts" / "one.safetensors", {"format": "pt"})
    assert model_identity(directory) != before


# An adapter that is merged


def unmerged(adapter: Path, base: Path) -> torch.Tensor:
    """The logits of peft's own network."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return PeftModel.from_pretrained(network, adapter).eval()(input_ids=IDS).logits


@pytest.mark.parametrize("modules", ["embed_tokens,lm_head", "embed_tokens", "lm_head,q_proj"])
def test_what_is_merged_is_what_was_trained_also_on_tied_embeddings(
    models: Path, dataset: Path, tmp_path: Path, modules: str
) -> None:
    """In memory, as the transformers engine draws, and as the copy of --merge_adapter. Merged into the weights that
    embedding and head share, each would get the changes of both."""
    base = models / "gemma2"
    flags = [f"--lora_target_modules={modules}", "--lora_alpha=64", "--merge_adapter", "--learning_rate=2e-2"]
    out = run_training(base, dataset, tmp_path / "out", "--use_peft", *flags)
    trained = unmerged(out, base)
    assert (trained - logits(base)).abs().max() > 0.5
    torch.testing.assert_close(logits(out), trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(out / "merged"), trained, rtol=1e-4, atol=1e-4)


def test_all_weights_of_a_policy_that_is_an_adapter_are_trained(models: Path, dataset: Path, tmp_path: Path) -> None:
    """As those of the same policy as a model of its own. peft freezes the base of an adapter."""
    adapter = tiny.lora(models / "llama3", tmp_path / "adapter")
    shutil.copytree(models / "llama3", tmp_path / "whole")
    load_causal_lm(open_policy(str(adapter)), torch.float32).save_pretrained(tmp_path / "whole")
    trained, alone = (run_training(tmp_path / name, dataset, tmp_path / f"{name}-out") for name in ("adapter", "whole"))
    weights, same = (load_file(out / "model.safetensors") for out in (trained, alone))
    start = load_file(tmp_path / "whole" / "model.safetensors")
    assert not any(weights[name].equal(start[name]) for name in start)
    for name in start:
        torch.testing.assert_close(weights[name], same[name], rtol=1e-5, atol=1e-6)


def test_a_merge_that_changes_the_network_is_an_error(
    models: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run_training(
        models / "gemma2", dataset, tmp_path / "out", "--use_peft", "--lora_target_modules=lm_head",
        "--learning_rate=2e-2", "--lora_alpha=64",
    )  # fmt: skip
    monkeypatch.setattr("sppo.models.loading._untie", lambda _: None)
    with pytest.raises(
        SPPOError, match=r"cannot be merged into its base: .* are 4.\d nats a token apart, .*Use --engine"
    ):
        logits(out)


# What cannot be loaded is refused by the preflight, in the words of the stage


def problems(model: Path, tmp_path: Path, *more: str) -> list[str]:
    """What the preflight says no to."""
    prompts = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Name {i} rivers"} for i in range(40)])
    flags = [
        f"--model={model}",
        f"--prompts={prompts}",
        "--ranker=examples.demo:rule",
        "--pairs=3",
        "--maxlen=24",
    ]
    flags += [f"--recipe={tiny.ROOT / 'recipes/sppo/demo.yaml'}", "--gpus=none", f"--run_dir={tmp_path / 'run'}"]
    _, recipe = cli.parse(driver_parser(""), [*flags, *more])
    found = verdict.examine(verdict.open_run(iterations.opened(recipe))).found
    return [f.text for findings in found.values() for f in findings if f.level == "no"]


@pytest.mark.slow
def test_an_adapter_that_vllm_does_not_take(models: Path, tmp_path: Path) -> None:
    """vLLM itself is asked, by its engine before it loads anything, and by the preflight."""
    pytest.importorskip("vllm")
    adapter = tiny.lora(models / "llama3", tmp_path / "adapter")
    assert check_vllm(open_policy(str(adapter))) == {"enable_lora": True, "max_lora_rank": 8}
    assert not problems(adapter, tmp_path, "--engine=vllm", "--use_peft")
    whole = (adapter / "adapter_config.json").read_text()
    refused = [
        ({"use_dora": True}, "vLLM does not yet support DoRA"),
        ({"bias": "all"}, "Adapter bias is not supported"),
        ({"lora_bias": True}, "does not support LoRA bias"),
        ({"rank_pattern": {"q_proj": 1024}}, "vLLM takes no adapter of rank 1024"),
        ({"modules_to_save": ["lm_head"]}, "Unsupported modules_to_save: .'lm_head'."),
    ]
    for values, said in refused:
        (adapter / "adapter_config.json").write_text(whole)
        tiny.edit_json(adapter / "adapter_config.json", **values)
        with pytest.raises(SPPOError, match=rf"{said}.*; pass --engine transformers, or merge it"):
            vllm.start(open_policy(str(adapter)), Recipe(), 64)
    (text,) = problems(adapter, tmp_path, "--engine=vllm", "--use_peft")
    assert "Unsupported modules_to_save" in text
    (adapter / "adapter_config.json").write_text(whole)
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.zeros(2, 64)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(SPPOError, match=r"vLLM does not take .*token_adapter"):
        check_vllm(open_policy(str(adapter)))


def test_answers_are_scored_with_an_adapter_where_that_can_be(models: Path, tmp_path: Path) -> None:
    """vLLM's CPU build draws with an adapter, but breaks down over a prompt's log-probs, which lm-eval asks for."""
    pytest.importorskip("vllm")
    pytest.importorskip("lm_eval")
    policy = open_policy(str(tiny.lora(models / "llama3", tmp_path / "adapter")))
    asked = SimpleNamespace(recipe=Recipe(engine="vllm"))
    with pytest.raises(SPPOError, match="cannot score answers with an adapter; pass --engine transformers"):
        open_llm._engine(asked, policy)
    asked.recipe.engine = "auto"
    model = open_llm._engine(asked, policy)
    with torch.no_grad():
        made = model.model(input_ids=IDS).logits
    torch.testing.assert_close(made, unmerged(tmp_path / "adapter", models / "llama3"), rtol=1e-4, atol=1e-4)


def test_weights_that_vllm_alone_would_read(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    shutil.copytree(models / "llama3", tmp_path / "model")
    shutil.copy(models / "llama3" / "model.safetensors", tmp_path / "model" / "older.safetensors")
    (text,) = problems(tmp_path / "model", tmp_path, "--engine=vllm")
    assert "vLLM reads every .safetensors of a model without an index, so older.safetensors too" in text
    assert not problems(tmp_path / "model", tmp_path, "--engine=transformers")


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_model_in_four_bits_without_bitsandbytes(models: Path, dataset: Path, tmp_path: Path, engine: str) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm")
    shutil.copytree(models / "llama3", tmp_path / "model")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    tiny.edit_json(tmp_path / "model" / "config.json", quantization_config=settings)
    (text,) = problems(tmp_path / "model", tmp_path, f"--engine={engine}", "--use_peft")
    assert "bitsandbytes" in text
    with pytest.raises(SPPOError, match="requires bitsandbytes"):
        run_training(tmp_path / "model", dataset, tmp_path / "out", "--use_peft")
    with pytest.raises(SPPOError, match="its weights are quantised, so they cannot be trained; pass --use_peft"):
        run_training(tmp_path / "model", dataset, tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--use_peft", "--lora_target_modules=nonsense"], "--lora_target_modules nonsense"),
        (["--attn_implementation=flash_attention_2"], "FlashAttention2"),
    ],
)
def test_a_network_that_cannot_be_trained_so(models: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    """Else it would be known only when the first iteration's data is there."""
    (text,) = problems(models / "llama3", tmp_path, "--engine=transformers", *flags)
    assert said in text


def test_end_and_padding_that_stand_in_generation_config_alone(models: Path, dataset: Path, tmp_path: Path) -> None:
    """It trains, to the same losses: padding lies where no attention looks."""
    shutil.copytree(models / "llama3", tmp_path / "model")
    tiny.edit_json(tmp_path / "model" / "tokenizer_config.json", eos_token=None, pad_token=None)
    assert not problems(tmp_path / "model", tmp_path, "--engine=transformers")
    lines = [
        preferences.metrics(run_training(model, dataset, tmp_path / f"out-{model.name}"))
        for model in (models / "llama3", tmp_path / "model")
    ]
    assert len(lines[0]) == 3
    for one, other in zip(*lines, strict=True):
        assert one["loss"] == other["loss"]


def test_a_mixture_of_experts_draws_on_a_cpu(tmp_path: Path) -> None:
    """In float64, in which PyTorch has no grouped product; its log-probs are float32's."""
    policy = open_policy(str(mixtral(tmp_path / "model")))
    tokenizer = policy.tokenizer()
    request = Request("a", array("i", range(5, 25)), 1, 8, logps=True)
    recipe = Recipe(pairs=2, temperature=1.0, top_p=1.0)
    ((_, drawn),) = engine.draw(policy, recipe, policy.stop_ids(tokenizer), [request])
    network = load_causal_lm(policy, torch.float32)
    for response in drawn:
        ids = torch.tensor([[*request.token_ids, *response.token_ids]])
        with torch.no_grad():
            logps = network(input_ids=ids).logits.log_softmax(-1)[0, 19:-1]
        own = logps.gather(-1, ids[0, 20:, None]).squeeze(-1)
        assert own.tolist() == pytest.approx(response.logps, abs=1e-4)
    assert not problems(tmp_path / "model", tmp_path, "--engine=transformers")


# A training begins at its reference, and its weights move


def opt(directory: Path) -> Path:
    """An OPT whose config has dropout, which it applies by itself."""
    from transformers import OPTConfig, OPTForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    fast = tiny.tokenizer(special, "<|im_start|>", "<|im_end|>", "<|endoftext|>", tiny.QWEN3_TEMPLATE, adds_bos=False)
    size = tiny.shape(fast, ffn_dim=96, word_embed_proj_dim=64, dropout=0.1, attention_dropout=0.1)
    return tiny.save(directory, OPTForCausalLM, OPTConfig(**size), fast, [fast.eos_token_id])


def mixtral(directory: Path, **settings: Any) -> Path:
    """A mixture of experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from examples.demo import CHAT_TEMPLATE

    fast = tiny.tokenizer(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", "</s>", CHAT_TEMPLATE)
    config = MixtralConfig(**tiny.shape(fast, num_local_experts=4, num_experts_per_tok=2, **settings))
    return tiny.save(directory, MixtralForCausalLM, config, fast, [fast.eos_token_id])


def test_dropout_is_off_wherever_a_module_keeps_it(tmp_path: Path) -> None:
    policy = open_policy(str(opt(tmp_path / "opt")))
    network = load_causal_lm(policy, torch.float32).train()
    assert not network(input_ids=IDS).logits.equal(network(input_ids=IDS).logits)
    disable_noise(network)
    assert network(input_ids=IDS).logits.equal(network(input_ids=IDS).logits)


@pytest.mark.parametrize("family", ["opt", "mixtral"])
def test_a_policy_that_is_not_its_reference_at_the_first_step_is_an_error(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Dropout that stays on, and the noise of a router, as if disable_noise did not know of them."""
    monkeypatch.setattr("sppo.training.train.disable_noise", lambda _: None)
    if family == "opt":
        model, named = opt(tmp_path / family), r"dropout 0.1, attention_dropout 0.1"
    else:
        model, named = mixtral(tmp_path / family, router_jitter_noise=0.1), r"router_jitter_noise 0.1"
    said = rf"differ by 0.\d+ nats times the square root.* rounding makes at most 0.002.*its config has .*{named}"
    with pytest.raises(SPPOError, match=said):
        run_training(model, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("checkpoint-*"))


@pytest.mark.parametrize(("tokens", "rounding"), [(1, 0.032), (400, 0.64)])
def test_rounding_of_short_and_of_long_answers_is_no_error(tokens: int, rounding: float) -> None:
    """0.032 nats are what bfloat16 makes of one token of SmolLM2; for many tokens it grows as their square root."""
    accelerator = SimpleNamespace(device="cpu", mixed_precision="bf16", reduce=lambda sums, _: sums)
    batch = {"input_ids": torch.zeros(1, 512), "positions": torch.arange(tokens)}
    for apart in (rounding, 10 * rounding):
        first_step = FirstStep(accelerator, FirstLoss(0.0, 0.0))
        first_step.note(torch.zeros(1), torch.tensor([-apart]), batch)
        if apart == rounding:
            first_step.check(torch.nn.Module(), LlamaConfig(attention_dropout=0.1), "table")
    with pytest.raises(SPPOError, match=r"by 0.32 nats times the square root of its tokens.*at most 0.15.*dropout 0.1"):
        first_step.check(torch.nn.Module(), LlamaConfig(attention_dropout=0.1), "table")


def rewards_of_the_first_step(model: Path) -> list[float]:
    line = preferences.metrics(model)[0]
    return [line["rewards/chosen"], line["rewards/rejected"]]


def test_a_reference_whose_table_is_damaged_is_noticed(models: Path, dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data, ignore=shutil.ignore_patterns("reference"))
    done = run_training(models / "qwen3", data, tmp_path / "one")
    assert rewards_of_the_first_step(done) == pytest.approx([0, 0], abs=1e-4)
    (table,) = (data / "reference").iterdir()
    save_file({"logps": load_file(table)["logps"] + 5}, table)
    with pytest.raises(SPPOError, match=f"or a damaged {table.name} .delete it"):
        run_training(models / "qwen3", data, tmp_path / "two")


def test_a_first_loss_that_the_win_rates_do_not_explain_is_a_warning(
    models: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A third of the chosen responses have another reference: too few for an error, and the loss is not as named."""
    data, flags = tmp_path / "data", ("--global_batch_size=24", "--batch_size=8")
    shutil.copytree(dataset, data, ignore=shutil.ignore_patterns("reference"))
    run_training(models / "qwen3", data, tmp_path / "one", *flags)
    assert "warning" not in capsys.readouterr().out
    (table,) = (data / "reference").iterdir()
    logps = load_file(table)["logps"].clone()
    logps[:14:2] += 5
    save_file({"logps": logps}, table)
    (line,) = preferences.metrics(run_training(models / "qwen3", data, tmp_path / "two", *flags))
    shown = capsys.readouterr().out
    said = re.search(r"the loss is (\S+), and it must be near (\S+); .* For 7 of the step's 42 responses", shown)
    assert said
    named = re.search(r"the loss must be near (\S+) ", shown)
    assert named
    assert float(said[1]) == pytest.approx(line["loss"], rel=1e-5)
    assert said[2] == named[1]


def no_gradient(network: Any) -> None:
    for weight in network.parameters():
        weight.register_hook(torch.zeros_like)


def frozen(network: Any) -> None:
    network.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "said"),
    [(no_gradient, "the gradient of each trained weight is 0"), (frozen, "all its weights are frozen")],
    ids=["no gradient", "frozen"],
)
def test_weights_that_do_not_move_are_an_error(
    models: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, said: str
) -> None:
    load = train.load_causal_lm

    def loaded(*args: Any) -> Any:
        network = load(*args)
        change(network)
        return network

    monkeypatch.setattr(train, "load_causal_lm", loaded)
    with pytest.raises(SPPOError, match=said):
        run_training(models / "qwen3", dataset, tmp_path / "out")


@pytest.mark.parametrize("flags", [(), ("--loss_type=sigmoid", "--label_smoothing=0.5")])
def test_a_loss_that_asks_for_nothing_is_no_error(models: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Win rates of 1/2, and a smoothing of 1/2: the gradient is 0 because it should be."""
    rows = preferences.rows(8)
    for row in rows:
        row |= {"chosen_probs": 0.5, "chosen_probs_win": 0.5, "chosen_probs_lose": 0.5}
    out = run_training(models / "qwen3", preferences.write(tmp_path / "data", rows), tmp_path / "out", *flags)
    assert preferences.metrics(out)[0]["grad_norm"] == pytest.approx(0, abs=1e-3)


# A request to stop


@pytest.fixture
def stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that asks to stop. SIGTERM is taken as by run_main, and leave() ends the command and not the tests."""
    monkeypatch.setenv(stopping.VARIABLE, str(tmp_path / "stop"))

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(train, "leave", leave)
    before = signal.signal(signal.SIGTERM, _terminated)
    yield tmp_path / "stop"
    signal.signal(signal.SIGTERM, before)


def test_a_pass_that_is_stopped_or_killed_is_gone_on_with(
    models: Path, dataset: Path, tmp_path: Path, stop: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The reference's pass is killed and then stopped, the anchor's is stopped: tables, losses and weights come out as
    from a training that nobody disturbed, to the bit, and what was kept is not computed again."""
    anchor = f"--anchor_model={tiny.lora(models / 'llama3', tmp_path / 'anchor')}"
    own, after = Forward.logps, SimpleNamespace(calls=0, moment=-1, what=stop.touch)

    def counted(self: Forward, *args: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():  # else it is a step
            after.calls += 1
            if after.calls == after.moment:
                after.what()
        return own(self, *args)

    monkeypatch.setattr(Forward, "logps", counted)
    monkeypatch.setattr(reference, "_KEPT_EVERY", 2)

    def start(name: str, moment: int = -1, what: Callable[[], Any] = stop.touch) -> int:
        """How many batches went through a network without a gradient; two of each network compare lean and plain."""
        data = tmp_path / f"data-{name}"
        shutil.copytree(dataset, data, ignore=shutil.ignore_patterns("reference"), dirs_exist_ok=True)
        after.calls, after.moment, after.what = 0, moment, what
        stop.unlink(missing_ok=True)
        run_training(models / "llama3", data, tmp_path / name, "--anchor=0.3", anchor)
        return after.calls

    def killed() -> None:
        raise RuntimeError("killed")

    whole = start("whole")
    with pytest.raises(RuntimeError, match="killed"):
        start("cut", 2 + 6, killed)  # in the sixth batch of the reference: four are kept
    with pytest.raises(SystemExit) as ended:
        start("cut", 2 + 3)  # in the third of those that were missing, which is the seventh
    assert ended.value.code == INTERRUPTED
    tables = list((tmp_path / "data-cut" / "reference").iterdir())
    assert len(tables) == 1  # a part of one
    assert 0 < int(load_file(tables[0])["logps"].isnan().sum()) < 42
    each = (whole - 4) // 2  # batches of one pass
    with pytest.raises(SystemExit):
        start("cut", 2 + each - 7 + 2 + 3)  # in the third of the anchor's
    assert after.calls == 2 + each - 7 + 2 + 3
    assert start("cut") == 2 + 2 + each - 3
    assert "stopped, as asked; the log-probs that were computed are kept" in capsys.readouterr().out

    names = sorted(path.name for path in (tmp_path / "data-whole" / "reference").iterdir())
    assert len(names) == 2
    assert names == sorted(path.name for path in (tmp_path / "data-cut" / "reference").iterdir())
    for name in names:
        one, other = (load_file(tmp_path / f"data-{run}" / "reference" / name)["logps"] for run in ("whole", "cut"))
        assert one.equal(other)
    times = ("tokens_per_second", "seconds_left")
    lines = [
        [{k: v for k, v in line.items() if k not in times} for line in preferences.metrics(tmp_path / run)]
        for run in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    before, now = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert all(before[name].equal(now[name]) for name in before)


def test_a_request_to_stop_is_heard_while_a_network_is_loaded(
    models: Path, dataset: Path, tmp_path: Path, stop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a large model takes minutes. Nothing of it can be kept, so it ends at once."""

    def slow(*_: Any) -> None:
        stop.touch()
        for _second in range(200):
            time.sleep(0.1)
        pytest.fail("it was not heard")

    monkeypatch.setattr(train, "load_causal_lm", slow)
    with pytest.raises(KeyboardInterrupt):
        run_training(models / "qwen3", dataset, tmp_path / "out")
    stop.unlink()
    with pytest.raises(KeyboardInterrupt):  # a ranker's, in the report and the win matrix
        list(rankers.pending_chunks([1], lambda _: False, 1, slow))
    with pytest.raises(KeyboardInterrupt), stopping.heard():  # asked before
        pytest.fail("it was not heard")
    stop.unlink()
    with stopping.heard():
        pass
    stop.touch()
    time.sleep(1.2)  # nothing comes once it is over
    assert os.environ[stopping.VARIABLE] == str(stop)

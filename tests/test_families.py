"""Families of chat models: what one of them does that another does not, and what would then be wrong in silence."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import preferences
import pytest
import tiny
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_families import config_of, make_model
from transformers import AutoModelForCausalLM

from sppo import run_sppo
from sppo.command.errors import SPPOError
from sppo.generation.engines import Request
from sppo.generation.engines import transformers as engine
from sppo.models import chat
from sppo.models.files import weight_shapes
from sppo.models.loading import load_causal_lm
from sppo.models.miniature import VOCABULARY, ignores_padding, miniature, miniature_of, refuse_not_causal
from sppo.models.policy import open_policy
from sppo.recipe import Recipe
from sppo.training.data import load_training_set
from sppo.training.first_step import FirstLoss, FirstStep
from sppo.training.logps import add_lean_forward, response_logps
from sppo.training.network import check_network, disable_noise, lora_for, refuse_untrainable
from sppo.training.read_back import check_saved, logps_of, restore_untrained
from sppo.training.trial import try_training

IDS = (torch.arange(64) * 11 % (VOCABULARY - 8) + 4).view(2, 32)
NOISE = ("drop", "jitter", "noise")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return preferences.write(tmp_path / "data", preferences.rows(8))


def run_training(model: Path, data: Path, out: Path, *flags: str) -> Path:
    run_sppo.main([*preferences.SMALL, f"--model={model}", f"--dataset={data}", f"--output_dir={out}", *flags])
    return out


def draw(model: Path, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    """The first answer to each prompt."""
    policy = open_policy(str(model))
    recipe = Recipe(model=str(model), prompts="x", pairs=2, maxlen=8, temperature=1.0, **settings)
    requests = [Request(str(i), ids, 7 + i, 8) for i, ids in enumerate(prompts)]
    finished = engine.draw(policy, recipe, policy.stop_ids(policy.tokenizer()), requests)
    answers = {request.prompt_id: responses[0].token_ids for request, responses in finished}
    return [answers[str(i)] for i in range(len(prompts))]


# The lean forward: whatever a network does between its backbone and its logits


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("hyperclovax", {"logits_scaling": 0.125}),
        ("cohere2", {"logit_scale": 0.0625}),
        ("falcon_h1", {"lm_head_multiplier": 0.04}),
        ("minicpm3", {"dim_model_base": 8}),
        ("inkling_text", {"logits_mup_width_multiplier": 2.0}),
        ("recurrent_gemma", {"logits_soft_cap": 3.0}),
        ("xlstm", {"output_logit_soft_cap": 3.0}),
        ("gemma3_text", {"final_logit_softcapping": 3.0}),
        ("modernbert-decoder", {}),
        ("opt", {}),
        ("llama4_text", {}),
        ("gpt_oss", {}),
        ("qwen3_next", {}),
    ],
)
def test_lean_log_probs_and_gradients_are_the_plain_ones(kind: str, settings: dict[str, Any]) -> None:
    """Scales under five names and both ways round, soft caps, layers before the head, a decoder in the backbone."""
    plain, lean = (miniature(config_of(kind, **settings)) for _ in range(2))
    assert add_lean_forward(lean)
    positions = torch.cat([torch.arange(5, 31), torch.arange(37, 57)])  # the second row ends early
    wanted = response_logps(plain(input_ids=IDS, use_cache=False).logits, IDS, positions)
    found = lean(input_ids=IDS, positions=positions, chunks=2, groups=[torch.arange(2)], widths=[32])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-4)
    (wanted[0] - wanted[1]).backward()
    (found[0] - found[1]).backward()
    for (name, one), other in zip(plain.named_parameters(), lean.parameters(), strict=True):
        if one.grad is not None:
            assert (one.grad - other.grad).norm() <= 1e-5 * one.grad.norm() + 1e-7, name


# Training mode


def with_noise(kind: str) -> Any:
    """The family's config with every dropout and every noise that it knows."""
    config = config_of(kind)
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if any(word in name for word in NOISE) and (isinstance(value, float) or name == "moe_jitter_eps"):
                setattr(part, name, 0.1)
    return config


@pytest.mark.parametrize(
    "kind", ["opt", "falcon", "bloom", "gpt_bigcode", "seed_oss", "persimmon", "mixtral", "phimoe"]
)
def test_training_mode_computes_what_evaluation_does(kind: str) -> None:
    """Dropout that a module keeps as a number or reads in the config at each call, and experts chosen at random."""
    network = miniature(with_noise(kind))
    with torch.no_grad():
        wanted = network(input_ids=IDS, use_cache=False).logits
        disable_noise(network)
        network.train()
        for _ in range(2):
            torch.testing.assert_close(network(input_ids=IDS, use_cache=False).logits, wanted, rtol=0, atol=1e-5)


def test_a_token_that_rounding_sends_to_another_expert_is_no_error() -> None:
    """One response of four is far from its reference then; noise or a wrong reference would move most of them."""
    accelerator = SimpleNamespace(device="cpu", mixed_precision="no", reduce=lambda sums, _: sums)
    batch = {"input_ids": torch.zeros(4, 16), "positions": torch.arange(4) * 16}
    for far, is_error in ((1, False), (3, True)):
        first_step = FirstStep(accelerator, FirstLoss(0.0, 0.0))
        ratios = torch.zeros(4)
        ratios[:far] = 0.3
        first_step.note(torch.zeros(4), ratios, batch)
        with pytest.raises(SPPOError, match="is its own reference") if is_error else nullcontext():
            first_step.check(torch.nn.Module(), config_of("llama"), "table")


def test_noise_is_off_and_the_config_that_is_saved_still_has_it(tmp_path: Path, dataset: Path) -> None:
    model = make_model("mixtral", tmp_path / "model", router_jitter_noise=0.1)
    done = run_training(model, dataset, tmp_path / "out")
    first = preferences.metrics(done)[0]
    assert [first["rewards/chosen"], first["rewards/rejected"]] == pytest.approx([0, 0], abs=1e-4)
    assert json.loads((done / "config.json").read_text())["router_jitter_noise"] == 0.1


def test_rows_on_both_sides_of_a_longropes_original_context(tmp_path: Path) -> None:
    """Phi-3 turns a whole batch by the factors that its longest sequence asks for."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "original_max_position_embeddings": 32}
    model = make_model("phi3", tmp_path / "model")
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    tiny.edit_json(model / "config.json", rope_parameters=rope, original_max_position_embeddings=32)
    rows = preferences.rows(32)
    for row in rows[:24]:  # short ones
        for side in ("chosen", "rejected"):
            row[side] = [
                {"role": "user", "content": "red"},
                {"role": "assistant", "content": row[side][1]["content"][:9]},
            ]
        row["prompt"] = row["chosen"][:1]
    data = preferences.write(tmp_path / "data", rows)
    tokenizer = open_policy(str(model)).tokenizer()
    found = load_training_set(
        data / "train.parquet", tokenizer, {tokenizer.eos_token_id}, Recipe(model="x", prompts="x")
    )
    assert found.lengths()[:24].max() <= 32 < found.lengths()[24:].max()
    first = preferences.metrics(run_training(model, data, tmp_path / "out", "--batch_size=8"))[0]
    assert [first["rewards/chosen"], first["rewards/rejected"]] == pytest.approx([0, 0], abs=1e-4)


# What a training would do, tried in miniature before anything is drawn


def refusal(kind: str, tmp_path: Path, **settings: Any) -> str:
    """What try_training says of a family; empty where it finds nothing."""
    policy = open_policy(str(make_model(kind, tmp_path / "model")))
    recipe = Recipe(model=str(tmp_path / "model"), prompts="x", **settings)
    try:
        check_network(recipe, policy)
        try_training(recipe, policy)
    except SPPOError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["llama", "jetmoe", "laguna", "phimoe"])
def test_what_can_be_trained_is_not_refused(kind: str, tmp_path: Path) -> None:
    assert refusal(kind, tmp_path, gradient_checkpointing=False) == ""


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("jetmoe", {}, "cannot recompute activations.*--gradient_checkpointing=false"),
        ("bert", {}, "reads the tokens behind a token too"),
        ("laguna", {"use_peft": True}, "adapter on model.*shared_experts.*not found again.*--lora_target_modules"),
        ("zamba2", {"use_peft": True, "lora_target_modules": "q_proj"}, "other log-probs once it is merged"),
        # it divides weights in evaluation, and not those of an adapter
        ("rwkv", {"use_peft": True}, "computes other log-probs in training than in evaluation"),
    ],
)
def test_what_would_fail_after_hours_is_refused_before(
    kind: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    assert re.search(said, refusal(kind, tmp_path, **settings))


@pytest.mark.parametrize(("kind", "method"), [("gpt_oss", "mxfp4"), ("qwen3", "fp8")])
def test_quantised_weights_are_not_trained_themselves(kind: str, method: str, tmp_path: Path, dataset: Path) -> None:
    """transformers would save them in a format that it does not read again."""
    model = make_model(kind, tmp_path / "model")
    tiny.edit_json(model / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(SPPOError, match="its weights are quantised, so they cannot be trained; pass --use_peft"):
        run_training(model, dataset, tmp_path / "out")


def test_a_doge_is_not_trained_beyond_its_window(tmp_path: Path) -> None:
    """In a longer row the same tokens have other logits: what was drawn would be trained at other log-probs."""
    network = miniature(config_of("doge", keep_window_size=16))
    with torch.no_grad():
        short, long = (network(input_ids=IDS[:1, :width], use_cache=False).logits[:, :20] for width in (20, 32))
    assert (short - long).abs().max() > 0.1
    policy = open_policy(str(make_model("doge", tmp_path / "model", keep_window_size=16)))
    refuse_untrainable(Recipe(max_length=16), policy)
    with pytest.raises(SPPOError, match="keep_window_size of 16 tokens, .* pass --max_length of at most 16"):
        refuse_untrainable(Recipe(max_length=17), policy)


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("llama", None),
        ("falcon", None),  # layers of a class of its own that do what a linear layer does
        ("llama4_text", "router"),  # that also chooses experts
        ("phimoe", "router"),
        ("jamba", "dt_proj"),  # whose weights are read past it
        ("falcon_h1", "out_proj"),  # that peft refuses
        ("zamba2", "shared_transformer"),  # weights of several layers
    ],
)
def test_all_linear_is_what_an_adapter_is_right_for(kind: str, left_out: str | None, tmp_path: Path) -> None:
    policy = open_policy(str(make_model(kind, tmp_path / "model")))
    recipe = Recipe(model="x", prompts="x", use_peft=True)
    excluded = lora_for(recipe, miniature_of(policy), load_causal_lm(policy, torch.float32)).exclude_modules
    assert excluded is None if left_out is None else left_out in excluded
    assert refusal(kind, tmp_path, use_peft=True) == ""


def test_an_adapter_on_a_layer_that_a_miniature_does_not_have(tmp_path: Path) -> None:
    """And a policy that is an adapter: its own layers count, and not those that a new one would have."""
    said = refusal("llama", tmp_path / "llama", use_peft=True, lora_target_modules="layers.7.self_attn.q_proj")
    assert said == ""
    base = make_model("laguna", tmp_path / "model")
    adapter = tiny.lora(base, tmp_path / "adapter")
    policy = open_policy(str(adapter))
    recipe = Recipe(model=str(adapter), prompts="x", use_peft=True)
    check_network(recipe, policy)
    try_training(recipe, policy)


def test_an_encoder_does_not_draw(tmp_path: Path) -> None:
    model = make_model("bert", tmp_path / "model")
    with pytest.raises(SPPOError, match="reads the tokens behind a token too, so it does not write text"):
        draw(model, [[5, 6, 7]])
    refuse_not_causal(miniature(config_of("llama")))


# Drawing


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma", "minimax", "llama"])
def test_a_prompt_draws_the_same_padded_or_not(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrent network reads the padding in front of a prompt as text, MiniMax from the second token on;
    transformers does not say so."""
    model = make_model(kind, tmp_path / "model")
    prompts = [[5, 60, 7, 90, 8], list(range(20, 31))]
    together = draw(model, prompts)
    assert ignores_padding(miniature(config_of(kind))) == (kind == "llama")
    monkeypatch.setattr(engine, "_BUCKET", 1)
    assert draw(model, prompts) == together


def test_a_network_that_knows_no_float64_draws_in_float32(tmp_path: Path) -> None:
    model = make_model("xglm", tmp_path / "model")
    assert draw(model, [[5, 6, 7]])
    assert draw(tiny.lora(model, tmp_path / "adapter"), [[5, 6, 7]])


def test_a_config_that_asks_for_the_routers_choices_ends_neither_generation_nor_training(
    tmp_path: Path, dataset: Path
) -> None:
    model = make_model("mixtral", tmp_path / "model", output_router_logits=True)
    assert draw(model, [[5, 6, 7]])
    assert json.loads((run_training(model, dataset, tmp_path / "out") / "config.json").read_text())[
        "output_router_logits"
    ]


def test_stops_that_stand_in_config_alone(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    (model / "generation_config.json").unlink()
    tiny.edit_json(model / "config.json", eos_token_id=[17, 23])
    policy = open_policy(str(model))
    assert {17, 23} < policy.stop_ids(policy.tokenizer())


# Templates


def test_a_template_that_reads_contents_as_lists_of_parts(tmp_path: Path) -> None:
    """It would drop a text without a word; so the text goes in as its only part."""
    fast = tiny.tokenizer(["<|a|>", "<|b|>", "<|c|>"], "<|a|>", "<|b|>", "<|c|>", "", adds_bos=False)
    fast.chat_template = (
        "{% for m in messages %}<|a|>{{ m.role }}: {% for part in m.content %}{% if part.type == 'text' %}"
        "{{ part.text }}{% endif %}{% endfor %}<|b|>{% endfor %}"
        "{% if add_generation_prompt %}<|a|>assistant: {% endif %}"
    )
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two and two?"}]
    rendered = chat.render(fast, chat.with_system(fast, asked, ""), True)
    assert rendered == "<|a|>system: be brief<|b|><|a|>user: two and two?<|b|><|a|>assistant: "


def test_a_template_that_reads_parts_of_the_user_alone(tmp_path: Path) -> None:
    """Parts for the other roles would be written as Python writes a list."""
    fast = tiny.tokenizer(["<|a|>", "<|b|>", "<|c|>"], "<|a|>", "<|b|>", "<|c|>", "", adds_bos=False)
    fast.chat_template = (
        "{% for m in messages %}<|a|>{{ m.role }}: {% if m.role == 'user' %}{% for part in m.content %}{{ part.text }}"
        "{% endfor %}{% else %}{{ m.content }}{% endif %}<|b|>{% endfor %}"
    )
    said = [("system", "be brief"), ("user", "hi"), ("assistant", "yo"), ("user", "two and two?")]
    rendered = chat.render(fast, [{"role": role, "content": text} for role, text in said], False)
    assert rendered == "".join(f"<|a|>{role}: {text}<|b|>" for role, text in said)


@pytest.mark.parametrize("filter_", ["upper", "replace('-', ' ')", "trim"])
def test_a_template_may_change_how_a_text_is_written(filter_: str) -> None:
    template = "{% for m in messages %}<|a|>{{ m.content | " + filter_ + " }}<|b|>{% endfor %}"
    fast = tiny.tokenizer(["<|a|>", "<|b|>", "<|c|>"], "<|a|>", "<|b|>", "<|c|>", template, adds_bos=False)
    asked = [{"role": "user", "content": "two and two?"}]
    assert chat.with_system(fast, asked, "") == asked


def test_a_template_that_leaves_out_what_the_user_says_is_refused(tmp_path: Path) -> None:
    fast = tiny.tokenizer(["<|a|>", "<|b|>", "<|c|>"], "<|a|>", "<|b|>", "<|c|>", "Hello. <|a|>", adds_bos=False)
    with pytest.raises(ValueError, match="leaves out what the user says"):
        chat.with_system(fast, [{"role": "user", "content": "two and two?"}], "")


# Saving: what was not trained is as it was read, and what was saved is what was trained


def stored_in_bfloat16(kind: str, directory: Path) -> dict[str, torch.Tensor]:
    """A model as it is published: weights in bfloat16, the router's bias in float32. Its tensors."""
    make_model(kind, directory)
    file = directory / "model.safetensors"
    tensors = {k: v if k.endswith("e_score_correction_bias") else v.bfloat16() for k, v in load_file(file).items()}
    bias = next(k for k in tensors if k.endswith("e_score_correction_bias"))
    tensors[bias] = torch.linspace(0.1, 0.2, len(tensors[bias]))  # no bfloat16 is equal to these
    save_file(tensors, file, metadata={"format": "pt"})
    tiny.edit_json(directory / "config.json", dtype="bfloat16")
    return tensors


def test_a_float32_tensor_that_nothing_trains_is_not_rounded(tmp_path: Path, dataset: Path) -> None:
    """It decides which experts a token goes to."""
    before = stored_in_bfloat16("deepseek_v3", tmp_path / "model")
    after = load_file(run_training(tmp_path / "model", dataset, tmp_path / "out") / "model.safetensors")
    assert after.keys() == before.keys()
    assert {k: v.dtype for k, v in after.items()} == {k: v.dtype for k, v in before.items()}
    biases = [k for k in before if k.endswith("e_score_correction_bias")]
    assert biases
    assert all(after[k].equal(before[k]) for k in biases)
    assert not after["lm_head.weight"].equal(before["lm_head.weight"])

    merged = run_training(tmp_path / "model", dataset, tmp_path / "lora", "--use_peft", "--merge_adapter") / "merged"
    after = load_file(merged / "model.safetensors")
    assert {k: v.dtype for k, v in after.items()} == {k: v.dtype for k, v in before.items()}
    assert all(after[k].equal(before[k]) for k in biases)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "llama4"])
def test_a_model_with_pictures_keeps_them(kind: str, tmp_path: Path, dataset: Path) -> None:
    """transformers loads the text part alone of two of these, and would save it as another kind of model."""
    model = make_model(kind, tmp_path / "model")
    done = run_training(model, dataset, tmp_path / "out")
    assert weight_shapes(done) == weight_shapes(model)
    assert json.loads((done / "config.json").read_text())["model_type"] == kind

    before, after = all_tensors(model), all_tensors(done)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert not [name for name in changed if "vision" in name or "visual" in name]
    again = run_training(done, dataset, tmp_path / "again", "--use_peft", "--merge_adapter")
    assert weight_shapes(again / "merged") == weight_shapes(model)


def all_tensors(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_saved_model_that_is_another_one_is_an_error(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    policy = open_policy(str(model))
    logps = logps_of(load_causal_lm(policy, torch.float32), policy)
    check_saved(model, policy, logps)
    check_saved(model, policy, logps + 0.05, is_half=True)  # as a GPU computes them, of weights stored in float32
    with pytest.raises(SPPOError, match=r"log-probs are 0.05 nats a token apart, and rounding makes at most 0.001"):
        check_saved(model, policy, logps + 0.05)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)
    shutil.copytree(model, tmp_path / "out")
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SPPOError, match=r"read back, its log-probs are .* nats a token apart"):
        check_saved(tmp_path / "out", policy, logps)


def test_float16_that_has_no_room_for_what_was_trained_in_float32(tmp_path: Path, dataset: Path) -> None:
    """Its weights are right, and its log-probs in float16 are not numbers: no reason to refuse it."""
    model = make_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    large = {k: 400 * v if k.endswith(("up_proj.weight", "gate_proj.weight")) else v for k, v in tensors.items()}
    save_file({k: v.half() for k, v in large.items()}, model / "model.safetensors", metadata={"format": "pt"})
    tiny.edit_json(model / "config.json", dtype="float16")
    policy = open_policy(str(model))
    assert not logps_of(load_causal_lm(policy, torch.float16), policy).isfinite().all()
    run_training(model, dataset, tmp_path / "out")


def test_a_network_that_changes_its_weights_in_evaluation_is_saved_as_trained(tmp_path: Path, dataset: Path) -> None:
    """RWKV divides weights of its later layers there, and multiplies them again when it is trained."""
    model = make_model("rwkv", tmp_path / "model", num_hidden_layers=8)
    done = run_training(model, dataset, tmp_path / "out", "--learning_rate=1e-9")
    before, after = all_tensors(model), all_tensors(done)
    assert all(torch.allclose(after[k], before[k], atol=1e-6) for k in before)


def test_a_full_disk_when_what_was_not_trained_is_put_back(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = make_model("qwen3_5", tmp_path / "model")
    monkeypatch.setattr("sppo.training.read_back._take_over", full)
    with pytest.raises(OSError, match="No space left on device"):
        run_training(model, dataset, tmp_path / "out")


def test_an_ordinary_model_is_saved_as_transformers_saves_it(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.save_pretrained(tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    restore_untrained(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_pad_token_beyond_the_embedding(tmp_path: Path, dataset: Path) -> None:
    """Added to the tokenizer, and the embedding never resized: usual in fine-tunes of 2023."""
    model = make_model("llama", tmp_path / "model")
    tokenizer = open_policy(str(model)).tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer.save_pretrained(model)
    run_training(model, dataset, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "llama"])
def test_two_processes_train_as_one_also_where_weights_have_no_part(kind: str, tmp_path: Path, dataset: Path) -> None:
    """DDP has to be told of weights without a gradient, as those for pictures."""
    model = make_model(kind, tmp_path / "model")
    words = [*preferences.SMALL, f"--model={model}", f"--dataset={dataset}", "--batch_size=2"]
    one = run_training(model, dataset, tmp_path / "one")
    tiny.succeed("scripts/launch.py", "sppo/run_sppo.py", *words, f"--model_dir={tmp_path / 'two'}", "--gpus=none,none")
    first, after, both = all_tensors(model), all_tensors(one), all_tensors(tmp_path / "two")
    change = max((after[k] - first[k]).abs().max() for k in after)
    assert max((after[k] - both[k]).abs().max() for k in after) < 1e-2 * change


@pytest.mark.slow
def test_a_handful_of_each_kind_goes_through_the_whole_loop(tmp_path: Path) -> None:
    """Dense and tied, scaled logits, experts, recurrent layers, sinks, pictures: drawing, ranking, training, twice."""
    kinds = ["gemma2", "granite", "mixtral", "qwen3_next", "gpt_oss", "qwen3_5"]
    where = [f"--work_dir={tmp_path / 'work'}", f"--output_dir={tmp_path}"]
    tiny.succeed("benchmarks/families.py", *kinds, *where, "--no_vllm")
    rows = [json.loads(line) for line in (tmp_path / "work" / "families.jsonl").read_text().splitlines()]
    assert {row["family"] for row in rows} == {*kinds}
    for row in rows:
        assert (row["loop"], row["lora"]) == ("yes", "yes"), row
        assert "gradients" in row, row  # else "logps" says what went wrong
        assert max(row["logps"], row["gradients"], float(row["processes"])) < 1e-3, row
    page = (tmp_path / "families.md").read_text()
    assert all(f"| {kind} |" in page for kind in kinds)

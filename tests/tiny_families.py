"""Tiny models of every family of chat models, each from its own config and with a chat template of its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

from sppo.models.miniature import small_config

# What the published models have and the config's defaults leave out.
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.01},
    },
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "gemma2": {"sliding_window": 64},
    "glm4_moe": {"head_dim": 128},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16, "num_hidden_layers": 32},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16, "num_hidden_layers": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 12, "num_hidden_layers": 24},
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16},
    "minicpm3": {"dim_model_base": 64},
    "minimax": {"layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10, "num_hidden_layers": 80},
    "ministral": {"head_dim": 128},
    "mixtral": {"router_jitter_noise": 0.1},
    "nemotron": {"num_key_value_heads": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
}

# Set once all else is small: vLLM's attention over compressed keys (MLA) knows these sizes only, or vLLM reads a name
# that transformers does not, or computes a size that transformers has a name for.
_MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64, "qk_head_dim": 80}
AS_VLLM_READS: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "falcon": {"ffn_hidden_size": 256},
    "glm4_moe_lite": {**_MLA, "first_k_dense_replace": 1},
    "jetmoe": {"kv_channels": 32},
    "lfm2": {"block_dim": 64, "conv_dim": 64, "conv_dim_out": 64},
}


def config_of(kind: str, **settings: Any) -> Any:
    """The family's config, small, with the ids of the tokenizer below."""
    config = CONFIG_MAPPING[kind](**{**AS_PUBLISHED.get(kind, {}), **settings})
    small = small_config(config)
    for name, value in AS_VLLM_READS.get(kind, {}).items():
        setattr(small, name, value)
    return small


def tokenizer_of(kind: str) -> tuple[Any, list[int]]:
    """(a tokenizer with the chat template of the family's kind, the ids that end an answer)."""
    if kind.startswith(("gemma", "recurrent_gemma", "vaultgemma")):
        special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
        fast = tiny.tokenizer(special, "<bos>", "<eos>", "<pad>", tiny.GEMMA_TEMPLATE)
        return fast, fast.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    if kind.startswith(("llama", "mllama")):
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        fast = tiny.tokenizer(special, special[0], "<|eot_id|>", "<|end_of_text|>", tiny.LLAMA3_TEMPLATE)
        return fast, fast.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    if kind.startswith(("mistral", "mixtral", "ministral")):
        from examples.demo import CHAT_TEMPLATE

        fast = tiny.tokenizer(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", "</s>", CHAT_TEMPLATE)
        return fast, [fast.eos_token_id]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    fast = tiny.tokenizer(special, "<|im_start|>", "<|im_end|>", "<|endoftext|>", tiny.QWEN3_TEMPLATE, adds_bos=False)
    return fast, fast.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def make_model(kind: str, directory: Path, **settings: Any) -> Path:
    """A tiny model of the family: of one with pictures all of it, as it is published."""
    torch.manual_seed(0)
    config = config_of(kind, **settings)
    is_wrapper = getattr(config, "vision_config", None) is not None
    network = (AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM).from_config(config)
    for weight in network.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.1)
    tokenizer, stops = tokenizer_of(kind)
    network.generation_config = GenerationConfig(eos_token_id=stops, bos_token_id=tokenizer.bos_token_id)
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory

"""A miniature of a network: the same architecture and settings, a few narrow layers, random weights, on the CPU.

What an architecture does, and not how well, can be tried on it in a second: whether it is causal, what it does in
training mode, which of its layers can have an adapter, whether its activations can be recomputed.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sppo.command.errors import FOREIGN, SPPOError, first_line
from sppo.models.loading import load_config, some_ids, use_eager_experts
from sppo.models.policy import Policy

if TYPE_CHECKING:
    import torch

VOCABULARY = 384
ROUNDING = 1e-3  # by which logits and log-probs of a miniature, in float32, may differ where they should be equal
_LAYERS = 8  # where the config does not say of each layer what it is; of those that it lists, two of each kind
_MAX_PARAMETERS = (
    20_000_000  # parameters beyond which a network is no miniature: something in its config was not made small
)

# The most that a setting may be in a miniature, by the names that configs have for it.
_MOST_OF = {
    64: "hidden_size d_model n_embd model_dim dim_model emb_dim embedding_dim word_embed_proj_dim lru_width",
    96: (
        "intermediate_size ffn_dim n_inner ffn_hidden_size dim_ff intermediate_size_mlp moe_intermediate_size "
        "expert_ffn_hidden_size expert_hidden_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size"
    ),
    32: (
        "head_dim attention_head_dim q_lora_rank kv_lora_rank o_lora_rank rel_extent index_topk "
        "position_bias_max_distance d_rel qk_head_dim"
    ),
    16: (
        "kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim dim_head linear_key_head_dim linear_value_head_dim "
        "linear_head_dim index_head_dim swa_head_dim swa_v_head_dim global_head_dim mamba_d_state state_size "
        "ssm_state_size mamba_d_head mamba_head_dim mamba_headdim mamba_chunk_size chunk_size "
        "hidden_size_per_layer_input laurel_rank"
    ),
    8: "mamba_n_heads mamba_num_heads zero_expert_num rotary_dim",
    4: (
        "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads linear_num_heads "
        "index_n_heads swa_num_attention_heads"
    ),
    2: (
        "num_attention_heads n_head n_heads num_heads num_experts_per_tok num_experts_per_token moe_k moe_topk "
        "moe_top_k top_k_experts linear_num_key_heads mamba_expand expand swa_num_key_value_heads "
        "num_global_key_value_heads"
    ),
    1: (
        "num_key_value_heads num_kv_heads kv_n_heads n_group topk_group n_shared_experts first_k_dense_replace "
        "num_mem_blocks num_kv_shared_layers mamba_ngroups n_groups mamba_n_groups"
    ),
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    512: "max_position_embeddings n_positions n_ctx max_seq_len original_max_position_embeddings",
    128: "attention_hidden_size",
}
_LIMITS = {name: most for most, names in _MOST_OF.items() for name in names.split()}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")


def miniature(config: Any, remote_code: bool = False) -> Any:
    """A causal network of the config's architecture in eval mode, float32, with up to VOCABULARY tokens.

    Raises SPPOError where the config cannot be made small, or the small one does not run: this says nothing of the
    network itself.
    """
    import torch
    from transformers import AutoModelForCausalLM

    small = small_config(config)
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(small, trust_remote_code=remote_code)
        count = sum(weight.numel() for weight in empty.parameters())
        if count > _MAX_PARAMETERS:
            raise ValueError(f"{count} parameters")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = AutoModelForCausalLM.from_config(small, dtype=torch.float32, trust_remote_code=remote_code)
            for weight in network.parameters():
                if weight.dim() > 1:  # wide enough that what a layer does is seen in the logits
                    torch.nn.init.normal_(weight, std=0.1)
        with torch.no_grad():
            network.eval()(input_ids=ids_for(network), use_cache=False)
    except FOREIGN as error:
        raise SPPOError(f"no miniature of a {config.model_type} can be made: {first_line(error)}") from None
    return network


def refuse_not_causal(network: Any) -> None:
    """Raise SPPOError where a token's logits depend on the tokens behind it, as those of an encoder (BERT) do.

    network: a miniature.
    """
    import torch

    ids = ids_for(network)
    other = ids.clone()
    other[:, -1] = ids[:, 0]
    with torch.no_grad():
        one, two = (network(input_ids=x, use_cache=False).logits[:, :-1] for x in (ids, other))
    if (one - two).abs().max() > ROUNDING:
        raise SPPOError(
            f"a {network.config.model_type} reads the tokens behind a token too, so it does not write text from left "
            "to right; take a chat model"
        )


def ignores_padding(network: Any) -> bool:
    """Whether what is drawn to a prompt that is padded on the left has the same logits as without.

    A recurrent network may read padding as text, in the prompt or only from the second token on (MiniMax). network: a
    miniature. False where it cannot be asked.
    """
    import torch
    from transformers import GenerationConfig

    prompt = ids_for(network, sequences=1)
    padded = torch.cat([torch.full((1, 5), 1), prompt], 1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    how = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=1, eos_token_id=1)
    drawn = []
    try:
        for ids, seen in ((prompt, torch.ones_like(prompt)), (padded, mask)):
            output = network.generate(
                ids, attention_mask=seen, generation_config=how, output_logits=True, return_dict_in_generate=True
            )
            drawn.append(torch.stack(output.logits))  # (4, 1, V)
    except FOREIGN:
        return False
    return bool((drawn[0] - drawn[1]).abs().max() <= ROUNDING)


def why_not_drawn(network: Any) -> str:
    """What transformers says where it cannot draw from a miniature; "" where it can."""
    try:
        network.generate(ids_for(network), max_new_tokens=2, do_sample=False)
    except FOREIGN as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def knows_float64(network: Any) -> bool:
    """Whether the architecture runs in float64. network: a miniature."""
    import torch

    double = copy.deepcopy(network).double()
    use_eager_experts(double)
    try:
        with torch.no_grad():
            double(input_ids=ids_for(network), use_cache=False)
    except FOREIGN:
        return False
    return True


def ids_for(network: Any, sequences: int = 2) -> torch.Tensor:
    """(sequences, 16): token ids that a miniature knows."""
    return some_ids(network.get_input_embeddings().weight.shape[0], sequences)


def miniature_of(policy: Policy) -> Any | None:
    """A miniature of a policy's network, without its adapter; None where none can be made, so that nothing is known."""
    try:
        return miniature(load_config(policy), policy.remote_code)
    except SPPOError:
        return None


def small_config(config: Any) -> Any:
    """A copy of a transformers config with everything in it that makes a network large made small."""
    small = copy.deepcopy(config)
    for part in _parts(small):
        _shrink(part)
    small.__dict__.pop("quantization_config", None)
    return small


def _parts(config: Any) -> list[Any]:
    """A config and those inside of it, of its text, its pictures and so on."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    return [config, *(part for one in inner for part in _parts(one))]


def _shrink(config: Any) -> None:
    own = vars(config)  # not by getattr: what layers have of their own (Gemma-4) may not be asked of the whole
    heads = {own.get(name) for name in ("num_attention_heads", "n_head", "n_heads")} - {None}
    is_grouped = own.get("num_key_value_heads") not in heads
    is_rotary = "qk_rope_head_dim" in own and own.get("head_dim") == own["qk_rope_head_dim"]
    _drop_layers(config)
    for name, value in list(own.items()):
        if isinstance(value, bool):
            continue
        if isinstance(value, int) and name in _LIMITS:
            setattr(config, name, min(value, _LIMITS[name]))
        elif isinstance(value, int) and name.endswith(("token_id", "token_index")):
            setattr(config, name, {"bos": 1, "eos": 2, "pad": 0}.get(name[:3], 3))  # any that are in the vocabulary
        elif isinstance(value, list) and name == "eos_token_id":
            config.eos_token_id = 2
        elif isinstance(value, list) and name in _LIMITS:  # one for each layer
            setattr(config, name, [min(one, _LIMITS[name]) for one in value])
    _settle(config, is_grouped, is_rotary)
    turned = own.get("qk_rope_head_dim") or own.get("head_dim") or _LIMITS["head_dim"]  # numbers of a head
    for name in ("rope_parameters", "rope_scaling"):
        _shorten(own.get(name), turned)


def _settle(config: Any, is_grouped: bool, is_rotary: bool) -> None:
    """Set what follows from other settings: is_grouped, fewer keys than heads; is_rotary, all of a head turns."""
    own = vars(config)
    if not is_grouped and "num_key_value_heads" in own:
        config.num_key_value_heads = config.num_attention_heads
    if is_rotary:
        config.head_dim = config.qk_rope_head_dim
    elif "qk_rope_head_dim" in own and own.get("partial_rotary_factor"):
        config.qk_rope_head_dim = int(config.head_dim * config.partial_rotary_factor)
    if "mamba_d_ssm" in own:
        config.mamba_d_ssm = config.mamba_n_heads * config.mamba_d_head
    if "n_mamba_heads" in own and "mamba_headdim" in own:
        config.n_mamba_heads = config.mamba_expand * config.hidden_size // config.mamba_headdim
    if config.model_type == "mamba2":
        config.num_heads = config.expand * config.hidden_size // config.head_dim
    if config.model_type == "codegen":
        config.n_head = 4
    if config.model_type == "rwkv":
        config.attention_hidden_size = config.hidden_size


def _shorten(rope: Any, turned: int) -> None:
    """Cut a rotary embedding's factors (longrope), of which there is one for each pair of a head's turned numbers."""
    for name, value in rope.items() if isinstance(rope, dict) else ():
        if isinstance(value, dict):
            _shorten(value, turned)
        elif name.endswith("_factor") and isinstance(value, list):
            rope[name] = value[: int(turned * rope.get("partial_rotary_factor", 1)) // 2]


def _drop_layers(config: Any) -> None:
    """Leave two layers of each kind that the config lists, and the first ones where it lists none."""
    counts = [name for name in _LAYER_COUNTS if isinstance(vars(config).get(name), int)]
    if not counts:
        return
    layers = getattr(config, counts[0])
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == layers}
    numbered = {name: value for name, value in vars(config).items() if _is_of_layers(value, layers)}
    kinds = [
        (*(str(value[i]) for value in lists.values()), *(i in value for value in numbered.values()))
        for i in range(layers)
    ]
    kept = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < 2]
    if not lists and not numbered:
        kept = list(range(min(layers, _LAYERS)))
    for name, value in lists.items():
        setattr(config, name, [value[i] for i in kept])
    for name, value in numbered.items():
        setattr(config, name, [kept.index(i) for i in value if i in kept])
    for name in counts:
        setattr(config, name, len(kept))
    if "_heterogeneity_spec" in vars(config):  # some layers have settings of their own (Gemma-4)
        own = vars(config)["_heterogeneity_spec"].per_layer_overrides
        config.per_layer_config = {
            kept.index(i): {name: _limited(name, value) for name, value in settings.items()}
            for i, settings in own.items()
            if i in kept
        }


def _limited(name: str, value: Any) -> Any:
    return min(value, _LIMITS[name]) if name in _LIMITS and isinstance(value, int) else value


def _is_of_layers(value: Any, layers: int) -> bool:
    """Whether a setting is a list of layers, by their numbers."""
    if not isinstance(value, list) or not value or not all(type(i) is int for i in value):
        return False
    return all(a < b for a, b in pairwise(value)) and value[0] >= 0 and value[-1] < layers

"""The recipe: every setting of a run, with its type, meaning and limits. One YAML holds them all.

An unknown key or a value out of range is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sppo.command.errors import UsageError
from sppo.command.importing import is_installed
from sppo.command.search_path import ROOT
from sppo.command.values import expanded, refuse_secrets, require_plain_address

DEFAULT_RECIPE = ROOT / "recipes" / "sppo" / "released.yaml"


def _key(default: Any, help: str, minimum: float | None = None, maximum: float | None = None) -> Any:
    metadata = {"help": help, "min": minimum, "max": maximum}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Recipe:
    """Settings of a run. The defaults here are `released`: what `bash run_sppo_mistral.sh` really did."""

    # the run
    model: str = _key("", "the model to start from, or to evaluate: Hub id or local directory")
    model_revision: str = _key("", "branch, tag or commit of the model on the Hub; empty: the default branch")
    trust_remote_code: bool = _key(False, "run the Python files that come with the model: only if you have read them")
    prompts: str = _key(
        "UCLA-AGI/data-mistral-7b-instruct-sppo-iter{iter}",
        "prompts: Hub id, local directory, .parquet, .jsonl or .csv; {iter} is the iteration's number",
    )
    prompts_revision: str = _key("", "branch, tag or commit of the prompts on the Hub")
    prompt_column: str = _key("prompt", "column that holds the prompt: a string or a list of messages")
    prompt_split: str = _key("train", "split of the prompts to read, where they have splits")
    split_prompts: bool = _key(False, "give each iteration its own disjoint part of one prompt set")
    iterations: int = _key(3, "iterations of generate, rank, train", 1)
    pairs: int = _key(5, "K, the responses drawn for each prompt; at least 2 can be ranked", 1)
    extra_responses: str = _key(
        "",
        "answers of other models, ranked beside the drawn ones: .parquet, .jsonl or .csv with prompt_id, and response "
        "or responses, the same number for each prompt; {iter} is the iteration's number",
    )
    seed: int = _key(42, "seed of sampling, hold-out and training order", 0, 2**31)
    # generation
    engine: Literal["auto", "vllm", "transformers"] = _key("auto", "auto takes vllm where it is installed")
    temperature: float = _key(0.7, "sampling temperature; 0, the likeliest token each time, with --pairs 1 alone", 0)
    top_p: float = _key(0.9, "nucleus sampling: the smallest set of tokens with this much probability", 1e-6, 1)
    maxlen: int = _key(2048, "longest response, in tokens", 1)
    dtype: Literal["auto", "bfloat16", "float32"] = _key(
        "auto", "precision in which vLLM draws; auto is the stored one, and on a GPU bfloat16 for float32"
    )
    prompt_seeds: bool = _key(
        True, "seed each prompt by itself, so that shards decide nothing; false is faster in vllm"
    )
    chat_template_kwargs: dict = _key(
        dict, 'arguments of the chat template, a judge\'s too: {"enable_thinking": false}'
    )
    thinking_tags: str = _key(
        "auto",
        "what marks a thought before an answer: auto, as the chat template shows it; off: a thought is a part of the "
        "answer; or OPEN,CLOSE: <think>,</think>",
    )
    thinking_budget: int = _key(
        0, "tokens after which a thought that has not ended is ended, so that an answer follows; 0: no such limit", 0
    )
    date: str = _key(
        "",
        "YYYY-MM-DD, which chat templates write where they ask for today's date. Empty: a driver takes the day of the "
        "run's first start; in one step by hand, and in an older run's recipe, it is today, each time. Generation, "
        "ranking and training that have begun go on with the day that they began on",
    )
    system_prompt: str = _key("", "system message put before every prompt that has none")
    gpu_memory_utilization: float = _key(0.9, "share of each GPU's memory that vLLM may take", 0.05, 1)
    # ranking
    ranker: str = _key(
        "llm-blender/PairRM", "preference model: a local directory, Hub id, module:name, or a judge's model name"
    )
    ranker_backend: Literal[
        "auto", "function", "gpm", "judge", "llm-blender", "pair-lm", "pairrm", "reward-model", "reward-server"
    ] = _key("auto", "what asks the ranker: auto is function for module:name, pairrm for everything else")
    ranker_revision: str = _key("", "branch, tag or commit of the ranker on the Hub")
    ranker_prompt: Literal["text", "templated"] = _key(
        "templated", "what a PairRM reads as the prompt: its text, or the policy's chat template around it"
    )
    ranker_system: Literal["keep", "drop"] = _key(
        "keep", "the prompt's system turn, for a ranker with a chat template: drop leaves it out, as some cards ask for"
    )
    ranker_template: str = _key(
        "judge", "what a pair-lm is asked: judge, rlhflow, or a file with {conversation}, {first} and {second}"
    )
    batch_tokens: int = _key(16384, "tokens in one batch of the ranker, padding included", 1)
    ranker_url: str = _key("", "the server of a judge or of a reward model: http://localhost:8000/v1")
    ranker_concurrency: int = _key(32, "requests that the ranker's server gets at once from each shard", 1)
    ranker_timeout: float = _key(120, "seconds that an answer of the ranker's server may take", 1e-3)
    ranker_retries: int = _key(5, "how often a request to the ranker's server is sent again when it fails", 0)
    judge_template: str = _key(
        "letter",
        "what a judge is asked: letter, con-j, mt-bench, offsetbias, prometheus-2, rise, selene, or a file with "
        "{conversation}, {first} and {second}",
    )
    judge_verdict: str = _key(
        "",
        r"regex whose one group names the better response in a judge's answer: '\[\[([ABC])\]\]'; empty: the preset's",
    )
    judge_max_tokens: int = _key(0, "tokens that a judge's answer may have; 0: the preset's, 1024 for a file", 0)
    judge_votes: int = _key(
        0,
        "answers of a judge to each pair at temperature 1, whose verdicts are counted; 0: one, by its log-probs",
        0,
        128,
    )
    # pairs
    estimator: Literal["auto", "released", "paper"] = _key(
        "released", "how win rates follow from the ranker's logits; auto is released for a PairRM, paper for all others"
    )
    ranker_temperature: float = _key(
        1.0,
        "T: the ranker's logits are divided by it, before they are preferences; above 1 makes these softer",
        *(1e-12, 1e12),
    )
    length_penalty: float = _key(
        0.0,
        "L: log-odds that the longer of two responses loses, times their difference in length over the mean length; "
        "twice that with --estimator released; 0: none",
        *(0, 100),
    )
    select: Literal["best_worst", "best_random", "best_2sd"] = _key(
        "best_worst",
        "the rejected response: the worst, a random other one, or the one nearest to two standard deviations below the "
        "mean score",
    )
    min_margin: float = _key(
        0.0, "drop pairs whose two win rates, chosen less rejected, are less than this apart; 0: none", 0, 1
    )
    test_size: float = _key(0, "prompts held out into test.parquet: a count, or a share below 1", 0)
    keep_degenerate: bool = _key(False, "keep pairs without a preference: same text, or all scores equal")
    # training
    loss_type: Literal["sppo", "sppo_single", "sppo_all", "sigmoid", "hinge", "ipo", "ipo_mean", "kto_pair"] = _key(
        "sppo",
        "training loss; sppo_all trains on all K responses of a prompt; ipo sums log-probs over tokens, as released, "
        "and ipo_mean takes their mean, as the authors of IPO do",
    )
    beta: float = _key(
        1e-3,
        "1/eta of SPPO's losses; each other loss_type has its own beta, so choose one for it",
        1e-12,
    )
    anchor: float = _key(0.0, "A: each step also goes this share of the way back to --anchor_model; 0: SPPO", 0, 0.99)
    reg: Literal["none", "reverse", "forward", "both"] = _key(
        "none",
        "RSPO: what is added to SPPO's loss for the distance from --anchor_model. With d, the log-ratio to it: "
        "reverse d^2, forward exp(-d), both their sum",
    )
    reg_coef: float = _key(0.0, "lambda, the weight of --reg in the loss", 0, 1e6)
    anchor_model: str = _key(
        "", "what --anchor and --reg pull towards: Hub id or directory; empty, in a run: its first model"
    )
    anchor_revision: str = _key("", "branch, tag or commit of the anchor's model on the Hub")
    label_smoothing: float = _key(0.0, "share of preferences taken to be the wrong way round, for sigmoid", 0, 0.5)
    learning_rate: float = _key(5e-7, "peak learning rate", 0)
    lr_scheduler_type: str = _key("linear", "schedule, by transformers' name")
    warmup_ratio: float = _key(0.1, "share of the schedule that is warm-up", 0, 1)
    num_train_epochs: float = _key(1, "epochs to train in an iteration", 0)
    schedule_epochs: float = _key(0, "epochs that the schedule is laid out over; 0: num_train_epochs", 0)
    optim: str = _key("rmsprop", "optimiser, by transformers' name")
    weight_decay: float = _key(0.0, "weight decay", 0)
    max_grad_norm: float = _key(0.0, "gradient clipping; 0 is none, as released", 0)
    global_batch_size: int = _key(64, "pairs in one optimiser step, over all processes", 1)
    batch_size: int = _key(8, "pairs in one forward pass of one process", 1)
    accumulate: int = _key(0, "accumulation steps; 0 derives them from global_batch_size and the processes", 0)
    gradient_checkpointing: bool = _key(True, "recompute activations in the backward pass, to save memory")
    max_prompt_length: int = _key(512, "longest prompt trained on, in tokens; cut on the left", 1)
    max_length: int = _key(1024, "longest prompt and response trained on, in tokens; the response is cut", 2)
    attn_implementation: str = _key("", "attention of transformers; empty: eager for Gemma-2, else its default")
    train_thoughts: bool = _key(
        True, "train on a response's thought and answer; false: on the answer alone, given the thought"
    )
    use_peft: bool = _key(False, "train a LoRA adapter; a policy that is an adapter goes on with its own")
    lora_r: int = _key(16, "rank of a new adapter", 1)
    lora_alpha: int = _key(32, "scale of a new adapter: lora_alpha / lora_r", 1)
    lora_target_modules: str = _key("all-linear", "modules that a new adapter is put on, with commas between them")
    load_in_4bit: bool = _key(False, "QLoRA: the base model in 4 bits under the adapter; needs bitsandbytes and a GPU")
    merge_adapter: bool = _key(False, "write a copy with the adapter merged into <output_dir>/merged")
    logging_steps: int = _key(1, "optimiser steps between two lines of metrics", 1)
    save_steps: int = _key(50, "optimiser steps between two checkpoints", 1)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = _key("none", "where metrics go besides files")
    # report
    eval_prompts: str = _key("", "held-out prompts for the report after each iteration; empty: no report")
    eval_pairs: int = _key(2, "responses drawn for each held-out prompt", 2)
    judge: str = _key(
        "",
        "a second judge for the report: reward-model:DIR_OR_ID, judge:NAME@URL, another --ranker_backend and a colon "
        "(pairrm:, pair-lm:, gpm:, reward-server:), or module:name of your own",
    )
    measure: str = _key(
        "", "a measure for the report, module:function(prompt, answer) -> {name: numbers}; it shows each name's mean"
    )
    base_perplexity: bool = _key(
        False, "report the first model's perplexity of the answers too, and the KL divergence from that model"
    )
    stop_when: Literal["none", "judge"] = _key(
        "none",
        "judge: end the run after an iteration whose answers --judge finds worse than those of the iteration before, "
        "or of which too many are empty, repeat themselves or are cut; it needs --judge and --eval_prompts",
    )
    evaluate: bool = _key(False, "at the end, compare all iterations' models with each other: the win matrix")
    # the Hub
    org: str = _key("", "Hub organisation or user to push each iteration's data to; empty: nothing is pushed")
    name: str = _key("", "name on the Hub of what is pushed, and of the run; empty: the model's name")
    public: bool = _key(False, "let everybody see what is pushed")
    push_model: bool = _key(False, "push each iteration's model to --org too")
    # where processes run
    gpus: str = _key("auto", "the GPUs: 0,2,5, or auto for all, or none for the CPU; on a cluster auto or none")
    launcher: Literal["local", "slurm", "ray"] = _key("local", "this machine, or a cluster")
    world_size: int = _key(1, "GPUs that one model is spread over in generation", 1)
    shards: int = _key(0, "parts of a stage's work; 0: one a GPU or group of GPUs", 0)
    nodes: int = _key(0, "machines that train together; 0: all there are", 0)
    ray_address: str = _key("", "ray: the address of the cluster; auto finds it; empty: a cluster made here")
    gpus_per_node: int = _key(0, "slurm: GPUs that the submitted job asks for on a node", 0)
    sbatch: str = _key("", 'slurm: more of the flags of sbatch: "--partition=gpu --time=12:00:00"')
    accelerate_config: str = _key(
        "",
        "a YAML, or a name in recipes/accelerate_configs; empty: cpu, one_gpu or zero3. Without GPUs it also says how "
        "many processes train",
    )
    # directories, and which iteration this is; a driver sets all but run_dir
    run_dir: str = _key("", "the run's directory; empty: runs/<name>")
    iteration: int = _key(0, "the iteration's number", 0)
    prompts_part: str = _key("0/1", "I/N: every N-th prompt from the I-th on")
    data_dir: str = _key("", "$DATA: where an iteration's responses, rankings and training set are")
    dataset: str = _key("", "what to train on: $DATA, a train.parquet, or a data set on the Hub; empty: data_dir")
    model_dir: str = _key("", "where the trained model appears")


# Settings that no longer exist, with their defaults. The recipe.yaml of an older run names them.
_REMOVED = {"fused_attention": False}

# Backends that read a conversation in the ranker's own chat template, through rankers/reading.py.
_READS_SYSTEM = ("reward-model", "gpm", "reward-server")

_ASKING = (
    "ranker ranker_backend ranker_revision ranker_template ranker_url ranker_timeout ranker_retries "
    "chat_template_kwargs judge_template judge_verdict judge_max_tokens judge_votes trust_remote_code"
).split()
_RANKING = "model model_revision date ranker_prompt ranker_system batch_tokens ranker_concurrency".split()
_DRAWING = (
    "model model_revision trust_remote_code prompt_column prompt_split maxlen engine dtype temperature top_p seed "
    "prompt_seeds system_prompt chat_template_kwargs thinking_tags thinking_budget date gpu_memory_utilization"
).split()
_PROCESSES = "gpus launcher world_size shards nodes ray_address".split()
# The settings that each script reads; its --help shows them first.
KEYS: dict[str, Sequence[str]] = {
    "launch": [*_PROCESSES, "accelerate_config"],
    "generate": [
        *("data_dir", "prompts", "prompts_revision", "prompts_part", "pairs", "extra_responses", "world_size"),
        *_DRAWING,
    ],
    "combine_generate": ["data_dir", "pairs", "extra_responses", "model", "model_revision", "trust_remote_code"],
    "preload": ["data_dir", *(key for key in _ASKING if key != "trust_remote_code")],
    "rank": ["data_dir", "pairs", *_ASKING, *_RANKING],
    "compute_prob": (
        "data_dir pairs estimator ranker_temperature length_penalty select min_margin test_size seed keep_degenerate"
    ).split(),
    "push_to_hub": ["data_dir", "model_dir", "org", "name", "public", "push_model"],
    "train": (
        "dataset model_dir iteration model model_revision trust_remote_code prompts_revision "
        "global_batch_size batch_size accumulate "
        "gradient_checkpointing logging_steps save_steps report_to seed loss_type beta anchor reg reg_coef "
        "anchor_model anchor_revision label_smoothing learning_rate lr_scheduler_type warmup_ratio num_train_epochs "
        "schedule_epochs optim weight_decay max_grad_norm max_prompt_length max_length attn_implementation "
        "train_thoughts chat_template_kwargs date use_peft lora_r lora_alpha lora_target_modules load_in_4bit "
        "merge_adapter"
    ).split(),
    "best_of_n": list(
        dict.fromkeys(
            [
                *(*_PROCESSES, "prompts", "prompts_revision", "estimator", "ranker_temperature"),
                *(*_DRAWING, *_ASKING, *_RANKING),
            ]
        )
    ),
    "win_matrix": ["run_dir", "judge", "ranker_temperature", *dict.fromkeys([*_ASKING, *_RANKING])],
    "evaluate": [*_PROCESSES, *(key for key in _DRAWING if key not in ("prompt_column", "prompt_split"))],
    "report": [
        *("run_dir", "iteration", *_PROCESSES, "eval_prompts", "eval_pairs", "judge", "measure", "base_perplexity"),
        *("stop_when", "ranker_temperature"),
        *dict.fromkeys([*_DRAWING, *_ASKING, *_RANKING]),
    ],
}

# `--judge`'s backends on a server, whose address stands behind their model's name
_ON_A_SERVER = ("judge", "reward-server")
_OWN = r"[\w.]+:\w+"  # module:name, a function or class of the user's
_TYPES = typing.get_type_hints(Recipe)
_FIELDS = {f.name: f for f in dataclasses.fields(Recipe)}
_BACKENDS = [name for name in typing.get_args(_TYPES["ranker_backend"]) if name != "auto"]


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A hint with the known name nearest to a misspelt one, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _convert(name: str, value: Any, where: str) -> Any:
    """A recipe's or flag's value as its field's type. Raises UsageError with the place it came from."""
    kind = _TYPES[name]
    try:
        if typing.get_origin(kind) is Literal:
            return _choice(value, typing.get_args(kind))
        if kind is bool:
            return _switch(value)
        if kind is dict:
            return _mapping(value)
        if kind is str:
            return expanded(name, _text(value))
        return _bounded(_number(value, kind), _FIELDS[name].metadata)
    except ValueError as error:
        raise UsageError(f"{where}: {name}: {ascii(value) if _is_broken(value) else repr(value)} is {error}") from None


def _choice(value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"not one of {', '.join(choices)}{nearest(str(value), choices)}")
    return value


def _switch(value: Any) -> bool:
    word = str(value).lower()
    if word not in ("true", "false"):
        raise ValueError("not true or false")
    return word == "true"


def _mapping(value: Any) -> dict[str, Any]:
    try:
        found = json.loads(value) if isinstance(value, str) else value
        is_json = found == json.loads(json.dumps(found))  # no dates, no numbers as keys, nothing within itself
    except (TypeError, ValueError, RecursionError):
        is_json = False
    if not is_json or not isinstance(found, dict):
        raise ValueError("not a mapping, or an object in JSON")
    return found


def _text(value: Any) -> str:
    if value is None or isinstance(value, (dict, list, bool)):
        raise ValueError("not a text")
    if _is_broken(value):
        raise ValueError("not a text in UTF-8")
    return str(value)


def _is_broken(value: Any) -> bool:
    """Whether a text holds bytes of the command line that are no UTF-8, or half a character in YAML."""
    return bool(re.search("[\ud800-\udfff]", str(value)))


def _number(value: Any, kind: type[int] | type[float]) -> float:
    """A finite number, or NaN, which no bound lets pass."""
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError
        number = kind(value)
        if math.isinf(number):
            raise OverflowError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"not {'a whole number' if kind is int else 'a number'}") from None
    return number


def _bounded(number: float, meta: Mapping[str, Any]) -> float:
    low, high = meta["min"], meta["max"]
    if math.isnan(number) or (low is not None and number < low) or (high is not None and number > high):
        raise ValueError("not " + (f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"))
    return number


def read_yaml(text: str) -> Any:
    """YAML's safe types. Raises ValueError for what is none, and for a key that is there twice: one would be lost."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.YAMLError(f"the key {name!r} is there twice{node.start_mark}")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Strict)  # noqa: S506 - a SafeLoader
    except Exception as error:  # noqa: BLE001 - besides YAMLError whatever int() or a date says of a value
        raise ValueError(str(error) or type(error).__name__) from None


def load_recipe(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe at `path` (default: released.yaml) with `overrides` on top. Raises UsageError."""
    path = Path(path) if path else DEFAULT_RECIPE
    try:
        raw = read_yaml(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        known = sorted(map(str, DEFAULT_RECIPE.parent.glob("*.yaml")))
        raise UsageError(f"no recipe at {path}; the project brings {', '.join(known)}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"recipe {path} is not a list of `key: value` lines")
    values = {}
    for source, where in ((raw, str(path)), (overrides or {}, "command line")):
        for name, value in source.items():
            if name in _REMOVED:
                if value is not _REMOVED[name]:
                    raise UsageError(f"{where}: {name}: {value!r}: this setting no longer exists; remove the line")
                continue
            if name not in _FIELDS:
                raise UsageError(f"{where}: unknown key {ascii(name)}{nearest(str(name), _FIELDS)}")
            refuse_secrets(f"{where}: {name}", value)
            values[name] = _convert(name, value, where)
    recipe = Recipe(**values)
    _require_consistent(recipe)
    return recipe


def _require_consistent(recipe: Recipe) -> None:
    """Raises UsageError for settings that contradict each other, whatever is done with them."""
    if recipe.judge:
        second_judge(recipe.judge)
    _require_ranker(recipe)
    if recipe.test_size > 1 and not float(recipe.test_size).is_integer():
        raise UsageError(f"test_size: {recipe.test_size:g}: a whole number of prompts, or a share below 1")
    parse_part(recipe.prompts_part)
    if recipe.date and not _is_date(recipe.date):
        raise UsageError(f"date: {recipe.date!r}: not a day of the calendar as YYYY-MM-DD, such as 2026-05-01")
    _require_thinking(recipe)
    if recipe.temperature < 0.01 and recipe.pairs > 1:
        raise UsageError(f"temperature: {recipe.temperature:g} draws {recipe.pairs} times the same; at least 0.01")
    if (recipe.public or recipe.push_model) and not recipe.org:
        raise UsageError(f"--{'public' if recipe.public else 'push_model'} needs --org, where to push to")

    # where processes run
    if recipe.ray_address and recipe.launcher != "ray":
        raise UsageError("--ray_address is for --launcher ray")
    if recipe.launcher != "slurm" and (recipe.gpus_per_node or recipe.sbatch):
        raise UsageError("--gpus_per_node and --sbatch are for --launcher slurm")
    if recipe.launcher == "local" and recipe.nodes > 1:
        raise UsageError(f"--nodes {recipe.nodes}: --launcher local is one machine; take slurm or ray")
    is_listed = recipe.gpus != "auto" and set(recipe.gpus.split(",")) != {"none"}
    if recipe.launcher != "local" and is_listed:
        raise UsageError(f"--gpus {recipe.gpus}: {recipe.launcher} gives each process its GPUs; auto, or none")


def _require_thinking(recipe: Recipe) -> None:
    """Raises UsageError for marks of thoughts that are none, and for a budget that leaves nothing to end or to say."""
    tags, budget = recipe.thinking_tags, recipe.thinking_budget
    marks = [mark.strip() for mark in tags.split(",")]
    if tags not in ("auto", "off") and not (len(marks) == 2 and all(marks) and marks[0] != marks[1]):
        raise UsageError(f"thinking_tags: {tags!r}: auto, off, or two different marks as OPEN,CLOSE: <think>,</think>")
    if budget and tags == "off":
        raise UsageError(f"--thinking_budget {budget}: with --thinking_tags off no thought is known that it could end")
    if budget >= recipe.maxlen:
        raise UsageError(
            f"--thinking_budget {budget} must be below --maxlen {recipe.maxlen}: an answer must fit behind it"
        )


def _require_ranker(recipe: Recipe) -> None:
    """Raises UsageError for a ranker that is none, and for a setting of the ranker that nobody would read."""
    require_plain_address("--ranker_url", recipe.ranker_url)
    name, asks = recipe.ranker, backend_name(recipe)
    if recipe.ranker_backend == "auto" and ":" in name and not _is_own(name) and not os.path.exists(name):
        raise UsageError(
            f"--ranker {name.partition('@')[0]}: neither a model's directory or Hub id, nor module:name of a function "
            f"or class; --ranker_backend says what asks a model ({', '.join(_BACKENDS)})"
        )
    if recipe.ranker_url and asks not in _ON_A_SERVER:
        raise UsageError(
            f"--ranker_url is for --ranker_backend {' or '.join(_ON_A_SERVER)}, and the one here is {asks}: name that "
            "backend, or leave the address out (--ranker_url= where a recipe has one)"
        )
    if recipe.ranker_system == "drop" and asks not in _READS_SYSTEM:
        raise UsageError(
            f"--ranker_system drop is for --ranker_backend {', '.join(_READS_SYSTEM)}, which read a prompt in a chat "
            f"template of their own; {asks} does not"
        )
    if recipe.ranker_template != "judge" and asks != "pair-lm":
        raise UsageError("--ranker_template is for --ranker_backend pair-lm")
    for key in ("judge_template", "judge_verdict", "judge_max_tokens", "judge_votes"):
        if getattr(recipe, key) != _FIELDS[key].default and asks != "judge":
            raise UsageError(f"--{key} is for --ranker_backend judge; a second judge (--judge) has the defaults")


def _is_date(text: str) -> bool:
    try:
        return bool(re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", text) and date.fromisoformat(text))
    except ValueError:
        return False


def backend_name(recipe: Recipe) -> str:
    """What asks the ranker: `auto` is a function for module:name, else PairRM."""
    if recipe.ranker_backend != "auto":
        return recipe.ranker_backend
    return "function" if re.fullmatch(_OWN, recipe.ranker) else "pairrm"


class SecondJudge(NamedTuple):
    """What --judge names: the `ranker` that it is, by which `backend`, and a server's `url`."""

    backend: str
    ranker: str
    url: str = ""


def second_judge(text: str) -> SecondJudge:
    """--judge, backend:ranker or module:name. Raises UsageError for what is neither, or shows more than an address."""
    head, _, rest = text.partition(":")
    if _is_own(text):
        return SecondJudge("function", text)
    if head not in _BACKENDS:
        form = f"backend:ranker ({', '.join(_BACKENDS)}), nor module:name of a function or class"
        raise UsageError(f"--judge {text.partition('@')[0]}: not {form}{nearest(head, _BACKENDS)}")

    if head in _ON_A_SERVER:
        served = re.fullmatch("(.+?)@(https?://.+)", rest)
        if not served:
            named = f"{head}:{rest.partition('@')[0]}"  # the rest may hold a key
            raise UsageError(f"--judge {named}: its server is missing; {head}:NAME@http://localhost:8000/v1")
        require_plain_address("--judge", served[2])
        return SecondJudge(head, *served.groups())
    if not rest.strip() or (head == "function" and not re.fullmatch(_OWN, rest)):
        wanted = "module:name" if head == "function" else "the model's directory or Hub id"
        raise UsageError(f"--judge {text}: {wanted} is missing behind {head}:")
    return SecondJudge(head, rest)


def is_second_judge(recipe: Recipe) -> bool:
    """Whether the recipe's ranker is what its --judge names, as in the recipe that evaluation/match.py makes of it."""
    asked = (recipe.ranker_backend, recipe.ranker, recipe.ranker_url)
    return bool(recipe.judge) and second_judge(recipe.judge) == asked


def _is_own(text: str) -> bool:
    """Whether a text is module:name. A backend's name is a module where there is one: a user's judge.py, say."""
    head = text.partition(":")[0]
    is_backend = head.replace("_", "-") in _BACKENDS
    return bool(re.fullmatch(_OWN, text)) and (not is_backend or is_installed(head) or Path(f"{head}.py").is_file())


def parse_part(text: str) -> tuple[int, int]:
    """ "1/3" as (1, 3). Raises UsageError."""
    numbers = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    if not numbers or int(numbers[1]) >= int(numbers[2]):
        raise UsageError(f"--prompts_part {text!r}: two numbers like 0/3, the first below the second")
    return int(numbers[1]), int(numbers[2])


def reads_anchor(recipe: Recipe) -> bool:
    """Whether training reads the log-probs of --anchor_model."""
    return bool(recipe.anchor) or recipe.reg != "none"


def require_pairs(recipe: Recipe) -> None:
    """Raises UsageError for K = 1: one response a prompt is enough for a benchmark, not for a comparison."""
    if recipe.pairs < 2:
        raise UsageError(f"pairs: {recipe.pairs}: at least 2 responses can be compared")

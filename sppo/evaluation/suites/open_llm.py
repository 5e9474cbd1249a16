"""The Open LLM Leaderboard's tasks, by lm-eval itself: six for the first leaderboard, its group for the second."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.command.errors import FOREIGN, SPPOError, first_line
from sppo.command.importing import is_installed
from sppo.command.progress import progress
from sppo.command.stopping import end_if_asked, heard
from sppo.evaluation.suites.suite import Figures, Order, SuiteJudge, figures_stage, finish
from sppo.models.dates import clock
from sppo.models.policy import Policy, policy_of
from sppo.models.vllm import check_vllm, cpu_cache, prepare_vllm, vllm_dtype
from sppo.recipe import Recipe, read_yaml
from sppo.store.files import atomic
from sppo.store.journal import Journal
from sppo.store.manifest import Stage, version_of

if TYPE_CHECKING:
    from lm_eval.api.model import LM

JUDGE = ""
CHUNK = 512  # requests between two entries of the journal
_BATCH = 16  # requests of the transformers engine at once


@dataclass(frozen=True)
class LeaderboardTask:
    """A task of lm-eval."""

    name: str
    shots: int | None  # examples in the prompt; None: as the task's own file says
    metric: str  # of lm-eval's results; empty: all of them
    dataset: str  # on the Hub


# arXiv 2405.00675, table 3; shots and metrics are the first leaderboard's
FIRST = [
    LeaderboardTask("arc_challenge", 25, "acc_norm,none", "allenai/ai2_arc"),
    LeaderboardTask("truthfulqa_mc2", 0, "acc,none", "truthfulqa/truthful_qa"),
    LeaderboardTask("winogrande", 5, "acc,none", "allenai/winogrande"),
    LeaderboardTask("gsm8k", 5, "exact_match,strict-match", "openai/gsm8k"),
    LeaderboardTask("hellaswag", 10, "acc_norm,none", "Rowan/hellaswag"),
    LeaderboardTask("mmlu", 5, "acc,none", "cais/mmlu"),
]
SECOND = [
    LeaderboardTask("leaderboard_bbh", None, "acc_norm,none", "SaylorTwift/bbh"),
    LeaderboardTask("leaderboard_gpqa", None, "acc_norm,none", "Idavidrein/gpqa"),
    LeaderboardTask("leaderboard_ifeval", None, "inst_level_strict_acc,none", "wis-k/instruction-following-eval"),
    LeaderboardTask("leaderboard_math_hard", None, "exact_match,none", "DigitalLearningGmbH/MATH-lighteval"),
    LeaderboardTask("leaderboard_mmlu_pro", None, "acc,none", "TIGER-Lab/MMLU-Pro"),
    LeaderboardTask("leaderboard_musr", None, "acc_norm,none", "TAUR-Lab/MuSR"),
]


def load_questions(order: Order) -> list[tuple[LeaderboardTask, Any]]:
    """(task, lm-eval's own object with its data loaded). `--questions` is a task in lm-eval's YAML, over local files.

    Raises SPPOError that names the data set that cannot be had.
    """
    from lm_eval import tasks as theirs

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if order.questions:
        path = Path(order.questions)
        if not path.is_file() or path.suffix != ".yaml":
            raise SPPOError(f"--questions {path}: for open_llm it is a task in lm-eval's own format, a .yaml file")
        try:
            name = read_yaml(path.read_text(encoding="utf-8"))["task"]
        except (ValueError, KeyError, TypeError) as error:
            raise SPPOError(f"--questions {path}: no task of lm-eval ({first_line(error)})") from None
        manager = theirs.TaskManager(include_path=str(path.parent.resolve()), include_defaults=False)
        wanted = [LeaderboardTask(name, None, "", str(path))]
    else:
        manager, wanted = theirs.TaskManager(), SECOND if order.leaderboard == 2 else FIRST
    return [(task, _load(task, manager)) for task in wanted]


def _load(task: LeaderboardTask, manager: Any) -> Any:
    from lm_eval.tasks import get_task_dict

    try:
        return get_task_dict([task.name], manager)
    except ModuleNotFoundError as error:
        raise SPPOError(
            f"open_llm: the task {task.name} needs the package {error.name}: pip install '.[eval]'"
        ) from None
    except FOREIGN as error:  # whatever datasets raises for what is not there, or a task's own Python file
        raise SPPOError(
            f"open_llm: the data set {task.dataset} of the task {task.name} is not here, and the Hub does not give it "
            f"({type(error).__name__}: {first_line(error)}). Where there is a network: bash scripts/evaluate.sh "
            "--suite open_llm --fetch, with the same --leaderboard; then copy HF_HOME"
        ) from None


def run_suite(order: Order, tasks: list[tuple[LeaderboardTask, Any]], judge: SuiteJudge | None) -> None:
    """Ask the model all tasks and write figures.json and results.json, lm-eval's own results."""
    from lm_eval.evaluator import evaluate

    policy = policy_of(order.recipe)
    stage = tasks_stage(order, policy, [task.name for task, _ in tasks])
    if not stage.make_ready(order.overwrite):
        return
    identity = {"model": stage.inputs["model"], "engine": "VLLM" if _uses_vllm(order.recipe, policy) else "HFLM"}
    journal = Journal(order.out / "answers.journal", identity, order.overwrite)
    stage.begin()
    with heard():
        model = _engine(order, policy)
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(model, name, kept(getattr(model, name), name, journal))
    figures: Figures = {}
    results: dict[str, Any] = {}
    for task, loaded in tasks:
        _set_shots(loaded, task.shots, order.recipe.seed)
        # the second leaderboard asks chat models in their own template, with examples as earlier turns
        chat = order.leaderboard == 2
        answered = evaluate(
            lm=model,
            task_dict=loaded,
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
        assert answered is not None  # None is for the other processes of a distributed run
        made: dict[str, Any] = {**answered}
        found = {**made["results"], **made.get("groups", {})}[task.name]
        results[task.name] = {"results": made["results"], "n-shot": made["n-shot"], "n-samples": made["n-samples"]}
        metrics = {k: v for k, v in found.items() if isinstance(v, float) and "stderr" not in k}
        chosen = {task.metric: metrics[task.metric]} if task.metric else metrics
        for metric, value in chosen.items():
            figures[f"{task.name}_{metric.split(',')[0]}_percent"] = 100 * value
    if not order.questions:
        figures = {"mean_percent": sum(figures.values()) / len(figures), **figures}
    with atomic(stage.outputs[1]) as temporary:
        temporary.write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")
    finish(order, stage, figures, len(tasks))
    journal.remove()


def tasks_stage(order: Order, policy: Policy, names: list[str]) -> Stage:
    """The stage that makes figures.json and results.json."""
    engine = "vllm" if _uses_vllm(order.recipe, policy) else "transformers"
    settings = {"tasks": names, "chat": order.leaderboard == 2, "seed": order.recipe.seed, "engine": engine}
    settings |= policy.date_identity({}) if order.leaderboard == 2 else {}
    return figures_stage(order, {"model": policy.identity()}, settings, ("results.json",))


def _uses_vllm(recipe: Recipe, policy: Policy) -> bool:
    """Whether vLLM scores the answers. Its CPU build crashes at a prompt's log-probs with an adapter."""
    import torch

    if policy.adapter is None or torch.cuda.is_available():
        return recipe.engine == "vllm" or (recipe.engine == "auto" and is_installed("vllm"))
    if recipe.engine == "vllm":
        raise SPPOError("vLLM's CPU build cannot score answers with an adapter; pass --engine transformers")
    return False


def _set_shots(loaded: dict[Any, Any], shots: int | None, seed: int) -> None:
    """Give each task its number of examples, as lm-eval's own simple_evaluate does; a group's tasks too."""
    for value in loaded.values():
        if isinstance(value, dict):
            _set_shots(value, shots, seed)
            continue
        if shots is not None and value.get_config("num_fewshot") != 0:
            value.set_config(key="num_fewshot", value=shots)
        value.set_fewshot_seed(seed=seed)


def kept(ask: Callable[..., list[Any]], kind: str, journal: Journal) -> Callable[..., list[Any]]:
    """lm-eval's `ask`, in chunks of requests. A journal keeps a chunk's answers as soon as they arrive.

    A chunk is asked as a whole, because the requests that share a batch change a log-prob's last bits.
    """

    def key(request: Any, count: int) -> str:
        return hashlib.sha256(json.dumps([kind, count, request.args], default=str).encode()).hexdigest()

    def asked(requests: list[Any], **settings: Any) -> list[Any]:
        seen: dict[str, int] = {}
        keys = []
        for request in requests:  # a request that comes twice may ask for a second sample
            first = key(request, 0)
            count = seen.get(first, 0)
            seen[first] = count + 1
            keys.append(key(request, count))
        with progress(len(requests), kind, "request") as bar:
            for start in range(0, len(requests), CHUNK):
                chunk = range(start, min(start + CHUNK, len(requests)))
                end_if_asked()
                if not all(keys[i] in journal.done for i in chunk):
                    for i, answer in zip(chunk, ask([requests[i] for i in chunk], disable_tqdm=True), strict=True):
                        journal.add(keys[i], {"answer": answer})
                bar.update(len(chunk))
        found = [journal.read(name)["answer"] for name in keys]
        return [tuple(x) if isinstance(x, list) else x for x in found]

    return asked


def _engine(order: Order, policy: Policy) -> LM:
    """lm-eval's model over the policy: vLLM where it is installed, else transformers."""
    import torch
    from lm_eval.api.registry import get_model

    recipe = order.recipe
    settings: dict[str, Any] = {"pretrained": str(policy.weights), "tokenizer": str(policy.tokenizer_dir)}
    settings |= {"trust_remote_code": policy.remote_code, "chat_template_args": clock(policy.tokenizer())}
    has_gpu = torch.cuda.is_available()
    if not _uses_vllm(recipe, policy):
        settings |= {"device": "cuda" if has_gpu else "cpu", "dtype": "auto", "batch_size": _BATCH}
        if policy.adapter:
            settings["peft"] = str(policy.adapter)
        return get_model("hf").create_from_arg_obj(settings)

    dtype = vllm_dtype(policy, not has_gpu)
    if has_gpu:
        settings |= {"tensor_parallel_size": recipe.world_size}
        settings |= {"gpu_memory_utilization": recipe.gpu_memory_utilization}
    else:  # as in generation/engines/vllm.py
        longest = policy.context() or 2048
        settings |= {"enforce_eager": True, "enable_chunked_prefill": False}
        settings |= {"max_num_batched_tokens": max(longest, 2048), **cpu_cache(policy, longest, dtype)}
    prepare_vllm(recipe.world_size)
    _import_with_vllm_cpu()
    rank = check_vllm(policy).get("max_lora_rank")  # lm-eval's own takes no adapter of more than 16
    settings |= {"dtype": dtype, "batch_size": "auto", "seed": recipe.seed}
    if rank:
        settings |= {"lora_local_path": str(policy.adapter), "max_lora_rank": rank}
    return get_model("vllm").create_from_arg_obj(settings)


def _import_with_vllm_cpu() -> None:
    """Import lm-eval's vLLM model, also where vLLM is its CPU build.

    That package is called vllm-cpu, and lm-eval asks for the version of vllm when it is imported.
    """
    from vllm.platforms import current_platform

    current_platform.is_cpu()  # vLLM asks for the package too, once, and must find it under its own name
    known = importlib.metadata.version
    if not version_of("vllm"):
        importlib.metadata.version = lambda name: known("vllm-cpu" if name == "vllm" else name)
    try:
        importlib.import_module("lm_eval.models.vllm_causallms")
    finally:
        importlib.metadata.version = known

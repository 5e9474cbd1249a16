"""What generation needs, looked at before a run starts: model, chat template, prompts, memory, time."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any

from sppo.command.errors import SPPOError
from sppo.generation.engines import pick_engine
from sppo.generation.engines.transformers import BATCH, DOUBLE
from sppo.generation.prompts import load_prompts
from sppo.generation.shards import prepare
from sppo.models import chat
from sppo.models.files import files_to_fetch, parameters, weight_names, weight_shapes
from sppo.models.loading import load_config, skeleton
from sppo.models.policy import adapter_base, open_policy
from sppo.models.shape import Shape, stored_bytes
from sppo.models.vllm import check_vllm
from sppo.preflight.findings import (
    RUNTIME,
    Finding,
    Findings,
    Load,
    PromptSet,
    Run,
    fits,
    many,
    no,
    note,
    ok,
    parameters_text,
    size,
)
from sppo.recipe import Recipe
from sppo.store.files import read_json

_LOOKED_AT = 20_000  # prompts of a set that are tokenised here
_ANSWER = "sppo-answer-probe"
# The share of the device's matrix rate that drawing reaches. CPU: measured (docs/benchmarks.md); GPU: a guess.
_SHARE = {("vllm", "cpu"): 0.29, ("transformers", "cpu"): 0.08, ("vllm", "gpu"): 0.10, ("transformers", "gpu"): 0.02}
# A token of a response is on disk in the journal (JSON), its shard, responses.parquet and train.parquet.
_TOKEN_BYTES = 40
_ROW_BYTES = 4000  # of a prompt beside its responses: its text, four times, its matrix, its pair


def model_now(run: Run) -> tuple[str, str]:
    """(name, revision) of the model that the first iteration with work left starts from."""
    first = run.left[0].number
    if first == 1:
        return run.recipe.model, run.recipe.model_revision
    return str(run.run_dir / f"iter{first - 1}" / "model"), ""


def check_model(run: Run) -> Findings:
    from huggingface_hub import constants
    from transformers import AutoModelForCausalLM

    name, revision = model_now(run)
    code = run.recipe.trust_remote_code
    if any(i.report for i in run.left) and name != run.recipe.model:
        open_policy(run.recipe.model, run.recipe.model_revision, code, constants.HF_HUB_OFFLINE)
    # offline, weights that are not in the cache would never come
    run.policy = policy = open_policy(name, revision, code, constants.HF_HUB_OFFLINE)
    raw = read_json(policy.weights / "config.json")
    wanted = [(name, revision), *([adapter_base(policy.adapter)] if policy.adapter else [])]
    found = {} if constants.HF_HUB_OFFLINE else files_to_fetch(*wanted[-1])
    shown = f"{name}: {raw.get('model_type', 'a model of no known type')}"
    if any(missing for _, missing in found.values()):
        stored = sum(found[name][0] for name in weight_names(policy.weights) & found.keys())
        if not stored:
            raise SPPOError(f"model {wanted[-1][0]} has no .safetensors on the Hub; pickled weights are not read")
        count = stored // stored_bytes(raw)
        run.downloads["model"] = sum(length for length, missing in found.values() if missing)
    else:
        count = parameters(weight_shapes(policy.weights))
    run.shape = Shape.of(raw, count)
    context = policy.context()
    shown += f", {parameters_text(count)}, context {context or 'unknown'}"
    shown += f", with the adapter {policy.adapter}" if policy.adapter else ""
    shown += f", {size(run.downloads['model'])} to download" if run.downloads else ""
    yield ok(shown)
    config = load_config(policy)
    if type(config) not in AutoModelForCausalLM._model_mapping and not policy.remote_code:
        yield no(f"{name} is a {raw.get('model_type')}, which transformers does not load as a causal model")
    elif run.generates:
        check = check_vllm if pick_engine(run.recipe.engine) == "vllm" else skeleton
        check(policy)
    run.loads_model = True
    if run.trains and context and run.recipe.max_length > context:
        yield note(f"--max_length {run.recipe.max_length} is beyond the model's context of {context} tokens")


def check_template(run: Run) -> Findings:
    if run.policy is None:
        yield note("not checked: the model cannot be read")
        return
    run.tokenizer = tokenizer = run.policy.tokenizer()
    kwargs = run.recipe.chat_template_kwargs
    user = [{"role": "user", "content": "What is two plus two?"}]
    try:
        ids = chat.prompt_ids(tokenizer, user, kwargs)
        prompt, bare = (chat.render(tokenizer, user, header, kwargs) for header in (True, False))
        whole = chat.render(tokenizer, [*user, {"role": "assistant", "content": _ANSWER}], False, kwargs)
    except ValueError as error:
        yield no(f"a plain user's question: {error}. Take the model's own template, or see --chat_template_kwargs")
        return
    yield from _bos(tokenizer, ids)
    before, found, behind = whole.partition(_ANSWER)
    if not found:
        yield note("the template does not render an assistant's answer as it is; data of other tools may not train")
        return
    yield _header(prompt, bare, before)
    yield from _end(run, tokenizer, behind)
    days = datetime(2024, 7, 26), datetime(2025, 8, 27)
    if len({chat.render(tokenizer, user, True, {**kwargs, "strftime_now": day.strftime}) for day in days}) > 1:
        yield note(
            "the template writes the day into each prompt. Where all prompts should have the same, give it by "
            '--chat_template_kwargs, as Llama-3.1 takes it: \'{"date_string": "26 Jul 2024"}\''
        )
    system = "taken" if chat.takes_system(tokenizer) else "folded into the first user turn"
    yield ok(f"a system turn is {system}")


def _bos(tokenizer: Any, ids: list[int]) -> Findings:
    bos = tokenizer.bos_token_id
    count = next((i for i, token in enumerate(ids) if token != bos), len(ids)) if bos is not None else 0
    plain = tokenizer("two")["input_ids"]
    if count > 1:
        yield no(f"a prompt begins with {count} {tokenizer.bos_token}; take all but one out of the chat template")
    elif bos is not None and not count and plain[0] == bos:
        yield note(
            f"a prompt begins without {tokenizer.bos_token}, which the tokenizer puts before plain text; if the model "
            "was trained with it, the chat template should begin with {{ bos_token }}"
        )
    else:
        yield ok(f"a prompt begins with one {tokenizer.bos_token}" if count else "a prompt begins without a BOS")


def _header(prompt: str, bare: str, before: str) -> Finding:
    """Whether the prompt ends where the answer begins, so that the model need not write its own header.

    bare: the prompt without the generation prompt; before: what stands before an answer.
    """
    missing = before[len(prompt) :].strip() if before.startswith(prompt) else prompt
    if not missing:
        return ok("a prompt ends where the answer begins")
    if prompt == bare and before.startswith(prompt):
        return no(
            f"the template adds no generation prompt: {missing!r} stands before an answer and not at a prompt's end; "
            "mend its `add_generation_prompt` part"
        )
    # as Qwen-3's empty <think></think>, or what enable_thinking adds: its own responses train as they were drawn
    return note("the template renders a prompt differently once it is answered; data of other tools may not train")


def _end(run: Run, tokenizer: Any, behind: str) -> Findings:
    """Whether what the template puts behind an answer is what stops generation."""
    stops = run.policy.stop_ids(tokenizer)
    names = tokenizer.convert_ids_to_tokens(sorted(stops))
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    if any(i in stops for i in ids):
        yield ok(f"an answer ends with {tokenizer.decode([i for i in ids if i in stops][:1])}, which stops generation")
    elif not behind.strip():
        yield note(f"the template puts no end behind an answer: of data without token ids, no {names} is learned")
    else:
        yield no(
            f"the template ends an answer with {behind!r}, token ids {ids}, and generation stops at {names}: responses "
            f"would run to --maxlen. Add {ids[0]} to eos_token_id in the model's generation_config.json"
        )


def check_prompts(run: Run) -> Findings:
    seen: dict[tuple[str, tuple[int, int]], list[int]] = {}
    for i in run.left:
        if i.data:
            part = (i.number - 1, run.recipe.iterations) if run.recipe.split_prompts else (0, 1)
            seen.setdefault((run.recipe.prompts.replace("{iter}", str(i.number)), part), []).append(i.number)
    for (source, part), numbers in seen.items():
        which = f"iteration {', '.join(map(str, numbers))}"
        try:
            made, skipped = _prepared(run, source, run.recipe, part)
        except SPPOError as error:
            yield no(f"{which}: {error}")
            continue
        run.sets.update(dict.fromkeys(numbers, made))
        reasons = f"; {len(skipped)} skipped: {_reasons(skipped)}" if skipped else ""
        text = f"{which}: {made.total} prompts in {source}{reasons}"
        if not made.usable:
            yield no(f"{text}. None is left to answer")
            continue
        yield note(text) if skipped else ok(text)
        yield from _cuts(run, which, made)


def _prepared(run: Run, source: str, recipe: Recipe, part: tuple[int, int]) -> tuple[PromptSet, list[str]]:
    """(prompts as generation will see them, why others are skipped). Raises SPPOError for what cannot be read."""
    prompts = load_prompts(source, recipe, part)
    if run.tokenizer is None:  # at least whether they can be read
        skipped = [p.skip for p in prompts if p.skip]
        return PromptSet(len(prompts), len(prompts) - len(skipped), [], [], []), skipped
    every = -(-len(prompts) // _LOOKED_AT)
    requests, conversations, left_out = prepare(recipe, run.policy, run.tokenizer, prompts[::every])
    lengths, rooms = [len(r.token_ids) for r in requests], [r.max_new_tokens for r in requests]
    usable = min(every * len(requests), len(prompts) - len(left_out))
    made = PromptSet(len(prompts), usable, lengths, rooms, list(conversations.values()), every)
    return made, [s["reason"] for s in left_out for _ in range(every)]


def _reasons(skipped: list[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(skipped).most_common(5))


def _cuts(run: Run, which: str, made: PromptSet) -> Findings:
    """What the stages' limits cut of the prompts and of the responses that may come."""
    recipe, limit = run.recipe, run.recipe.max_prompt_length
    if not made.lengths:
        return
    if made.every > 1:
        yield note(f"{which}: one prompt in {made.every} is looked at; counts and the longest are estimates")
    long = made.every * sum(length > limit for length in made.lengths)
    if long:
        yield note(f"{which}: {long} prompts are longer than --max_prompt_length {limit}; training cuts their left")
    rooms = [recipe.max_length - min(length, limit) for length in made.lengths]
    cut = made.every * sum(most > room for most, room in zip(made.rooms, rooms, strict=True))
    if cut:
        yield note(
            f"{which}: responses to {cut} prompts may be longer than training reads: up to {max(made.rooms)} tokens "
            f"are drawn, {min(rooms)} to {max(rooms)} fit --max_length {recipe.max_length} beside the prompt"
        )
    short = made.every * sum(room < recipe.maxlen for room in made.rooms)
    if short:
        yield note(f"{which}: {short} prompts leave less than --maxlen {recipe.maxlen} tokens of the model's context")


def check_held_out(run: Run) -> Findings:
    """The held-out prompts, where a report is asked for."""
    recipe = run.recipe
    if not any(i.report for i in run.left):
        return
    made, skipped = _prepared(run, recipe.eval_prompts, recipe, (0, 1))
    if not made.usable:
        yield no(f"--eval_prompts {recipe.eval_prompts}: none of {made.total} can be answered: {_reasons(skipped)}")
        return
    text = f"{made.total} held-out prompts" + (f", {len(skipped)} skipped: {_reasons(skipped)}" if skipped else "")
    k = recipe.eval_pairs
    text += f"; {made.usable * k} responses a model, {2 * made.usable * k * k} comparisons a report"
    yield note(text) if skipped else ok(text)


def check_memory(run: Run) -> Findings:
    if run.shape is None:
        yield note("not compared with the model, which cannot be read")
    elif not run.cpu and not run.cards:
        yield note("not compared with the model: that of the GPUs is not known")
    elif run.generates:
        yield _generation_fits(run, run.shape)


def _longest(run: Run) -> int:
    """Tokens of the longest sequence, as far as the prompts are known."""
    return max((s.longest for s in run.sets.values()), default=run.recipe.max_prompt_length) + run.recipe.maxlen


def _generation_fits(run: Run, shape: Shape) -> Finding:
    longest, shards = _longest(run), len(run.gpus) // run.world_size
    vllm = pick_engine(run.recipe.engine) == "vllm"
    if run.cpu:
        number = 4 if vllm or shape.parameters * shape.bytes > DOUBLE else 8
        certain = number * shape.parameters * shards
        more = (1 << 30) * shards if vllm else shape.cache(BATCH * longest, number) * shards
        parts = f"weights in {many(shards, 'process')} and up to {{}} of keys and values"
        return fits("generation", certain, more, run.main_memory, parts, "Take a smaller model, --maxlen or machine")
    if shape.heads % run.world_size:
        return no(f"--world_size {run.world_size} does not divide the model's {shape.heads} attention heads")
    certain = 2 * shape.parameters / run.world_size
    parts = "weights on each GPU and {} for keys and values and the runtime"
    if not vllm:
        free = min(free for _, free in run.cards.values())
        more = shape.cache(BATCH * longest) + RUNTIME
        return fits("generation", certain, more, free, parts, "Lower --maxlen, or take vLLM with a --world_size")
    share = run.recipe.gpu_memory_utilization
    for name, (total, free) in run.cards.items():
        if free < share * total:
            return no(
                f"generation: vLLM takes {share:g} of GPU {name}'s {size(total)}, of which {size(free)} is free; stop "
                f"what uses it, or --gpu_memory_utilization {int(100 * free / total) / 100:g}"
            )
    room = min(share * total for total, _ in run.cards.values())
    more = shape.cache(longest) / run.world_size + RUNTIME  # one sequence at a time, at the least
    return fits("generation", certain, more, room, parts, f"Try --world_size {2 * run.world_size}, or lower --maxlen")


def data_bytes(load: Load, tokens: int) -> int:
    """Bytes of an iteration's data on disk, with so many tokens in its responses."""
    return _TOKEN_BYTES * tokens + _ROW_BYTES * load.prompts if load.generate else 0


def seconds(load: Load, run: Run, parameters: int) -> float:
    """Rough seconds of drawing the iteration's responses, at run.rate FLOPs a second."""
    flops = 2 * parameters * (load.prompt_tokens + load.response_tokens(run.recipe)) if load.generate else 0
    return flops / (run.rate * _SHARE[pick_engine(run.recipe.engine), "cpu" if run.cpu else "gpu"])

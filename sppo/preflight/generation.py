"""Generation, looked at before a run starts: model, chat template, prompts, memory."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sppo.command.errors import SPPOError
from sppo.evaluation.guard import FEWEST
from sppo.generation.combine import unfinished_warning
from sppo.generation.engines import pick_engine
from sppo.generation.engines.transformers import BATCH, DOUBLE
from sppo.generation.prompts import load_prompts
from sppo.generation.templating import to_requests
from sppo.models import chat
from sppo.models.files import files_on_hub, parameters, weight_names, weight_shapes
from sppo.models.frames import writes_date
from sppo.models.loading import empty_network, load_config
from sppo.models.miniature import miniature_of, why_not_drawn
from sppo.models.policy import Policy, adapter_base, open_policy
from sppo.models.shape import Shape, stored_bytes
from sppo.models.thoughts import marks_of
from sppo.models.vllm import check_vllm, cpu_cache_bytes
from sppo.preflight.facts import Machines, Model, PromptSet, Run
from sppo.preflight.findings import Finding, Look, fits, many, no, note, ok, parameters_text, size
from sppo.preflight.memory import RUNTIME
from sppo.recipe import Recipe
from sppo.store.files import read_json
from sppo.store.manifest import read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOKED_AT = 20_000  # prompts of a set that are tokenised here
_QUESTION, _ANSWER = "What is two plus two?", "sppo-answer-probe"


def look_at_model(run: Run) -> Look[Model]:
    """The model that the first iteration with work left starts from. Raises SPPOError where it cannot be read."""
    from huggingface_hub import constants

    name, revision, code = run.recipe.model, run.recipe.model_revision, run.recipe.trust_remote_code
    offline = constants.HF_HUB_OFFLINE  # then weights that are not in the cache would never come
    first = run.left[0].number
    if first > 1:
        if run.reports:  # which compare with the first model
            open_policy(name, revision, code, offline)
        name, revision = str(run.run_dir / f"iter{first - 1}" / "model"), ""
    policy = open_policy(name, revision, code, offline, run.recipe.date)
    raw = read_json(policy.weights / "config.json")

    # an adapter's weights are few: those of its base count
    source, revision = adapter_base(policy.adapter) if policy.adapter else (name, revision)
    on_hub = {} if offline else files_on_hub(source, revision)
    to_download = sum(file.size for file in on_hub.values() if file.is_missing)
    if any(file.is_missing for file in on_hub.values()):
        stored = sum(on_hub[file].size for file in weight_names(policy.weights) & on_hub.keys())
        if not stored:
            raise SPPOError(f"model {source} has no .safetensors on the Hub; pickled weights are not read")
        count = stored // stored_bytes(raw)
    else:
        count = parameters(weight_shapes(policy.weights))

    kind, context = raw.get("model_type", "a model of no known type"), policy.context()
    shown = f"{name}: {kind}, {parameters_text(count)}, context {context or 'unknown'}"
    shown += f", with the adapter {policy.adapter}" if policy.adapter else ""
    shown += f", {size(to_download)} to download" if to_download else ""
    yield ok(shown)
    refusal = _refusal(run, name, kind, policy)
    if refusal:
        yield no(refusal)
    elif run.generates and pick_engine(run.recipe.engine) == "transformers":
        if run.recipe.dtype != "auto":
            yield no(f"--dtype {run.recipe.dtype} is for vLLM; with --engine transformers leave it out")
        small = miniature_of(policy)
        if small is not None and (why := why_not_drawn(small)):
            yield note(f"transformers cannot draw from a miniature of a {kind}, so perhaps not from it either ({why})")
    if run.trains and context and run.recipe.max_length > context:
        yield note(f"--max_length {run.recipe.max_length} is beyond the model's context of {context} tokens")
    return Model(policy, Shape.of(raw, count), to_download, loads=not refusal)


def _refusal(run: Run, name: str, kind: str, policy: Policy) -> str:
    """Why generation could not load the model; empty where it can."""
    from transformers import AutoModelForCausalLM

    try:
        config = load_config(policy)
        if type(config) not in AutoModelForCausalLM._model_mapping and not policy.remote_code:
            return f"{name} is a {kind}, which transformers does not load as a causal model"
        if run.generates and pick_engine(run.recipe.engine) == "vllm":
            check_vllm(policy)
        elif run.generates:
            empty_network(policy)
    except SPPOError as error:
        return str(error)
    return ""


def look_at_tokenizer(run: Run, model: Model) -> Look[PreTrainedTokenizerBase]:
    """The model's tokenizer, with a look at its chat template."""
    tokenizer = model.policy.tokenizer()
    yield from check_template(model.policy, tokenizer, run.recipe.chat_template_kwargs)
    yield from _thinking(run.recipe, model.policy, tokenizer)
    yield from _unfinished(run)
    return tokenizer


def check_template(policy: Policy, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> Look[None]:
    user = [{"role": "user", "content": _QUESTION}]
    try:
        ids = chat.prompt_ids(tokenizer, user, kwargs)
        prompt = chat.render(tokenizer, user, True, kwargs)
        bare = chat.render(tokenizer, user, False, kwargs)
        whole = chat.render(tokenizer, [*user, {"role": "assistant", "content": _ANSWER}], False, kwargs)
    except ValueError as error:
        yield no(f"a plain user's question: {error}. Take the model's own template, or see --chat_template_kwargs")
        return
    if _QUESTION not in prompt:
        yield no(
            f"the template leaves out what the user says; it makes {prompt!r} of a question. Take another template"
        )
        return
    yield from _bos(tokenizer, ids)
    before, found, behind = whole.partition(_ANSWER)
    if not found:
        yield note("the template does not render an assistant's answer as it is; data of other tools may not train")
        return
    yield _header(prompt, bare, before)
    yield from _end(policy, tokenizer, behind)
    if writes_date(tokenizer, kwargs):
        if policy.date:
            yield ok(f"the template writes the date into prompts: {policy.date} in all of the run (--date)")
        else:
            yield note(
                "the template writes today's date into prompts, so that they differ from day to day: this run began "
                "with a version that fixed no date"
            )
    system = "taken" if chat.takes_system(tokenizer) else "folded into the first user turn"
    yield ok(f"a system turn is {system}")


def _thinking(recipe: Recipe, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Look[None]:
    """Whether the model thinks before it answers. How many thoughts end within --maxlen shows only when it is drawn."""
    tags, budget = recipe.thinking_tags, recipe.thinking_budget
    marks = marks_of(
        tokenizer, policy.stop_ids(tokenizer), recipe.chat_template_kwargs, "auto" if tags == "off" else tags
    )
    if marks is None and budget:
        yield no(
            f"--thinking_budget {budget}: the template shows no marks of a thought, or --chat_template_kwargs switch "
            "thinking off; leave the budget out, or name the marks: --thinking_tags OPEN,CLOSE"
        )
    elif marks is None and tags not in ("auto", "off"):
        yield note(f"--thinking_tags {tags}: the template ends the thought in the prompt, so nothing is thought")
    elif marks and tags == "off":
        yield note(f"this template thinks: {marks}; with --thinking_tags off a thought is a part of the answer")
    elif marks:
        limit = f"; ended after {budget} tokens" if budget else ""
        yield ok(f"this template thinks: {marks}{limit}; the ranker sees the answer alone")


def _unfinished(run: Run) -> Look[None]:
    """Of iterations that are drawn already, how many thoughts did not end: where they are many, and more is drawn."""
    for number in range(1, run.recipe.iterations + 1) if run.makes_data else ():
        manifest = run.run_dir / f"iter{number}" / "data" / "responses.manifest.json"
        if manifest.exists() and (said := unfinished_warning(read_manifest(manifest)["counts"])):
            yield note(f"iteration {number}: {said}")


def _bos(tokenizer: Any, ids: list[int]) -> Look[None]:
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


def _end(policy: Policy, tokenizer: Any, behind: str) -> Look[None]:
    """Whether what the template puts behind an answer is what stops generation."""
    stops = policy.stop_ids(tokenizer)
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


def look_at_prompts(run: Run, model: Model | None, tokenizer: Any) -> Look[list[PromptSet]]:
    """The prompts of the iterations whose data is to be made; a set that several draw from is read once."""
    shared: dict[tuple[str, tuple[int, int]], list[int]] = {}
    for i in run.left:
        if i.data:
            part = (i.number - 1, run.recipe.iterations) if run.recipe.split_prompts else (0, 1)
            source = run.recipe.prompts.replace("{iter}", str(i.number))
            shared.setdefault((source, part), []).append(i.number)
    sets = []
    for (source, part), numbers in shared.items():
        made = PromptSet(source, numbers)
        try:
            _read(made, run.recipe, part, model, tokenizer)
        except SPPOError as error:
            yield no(f"{made.which}: {error}")
            continue
        sets.append(made)
        text = f"{made.which}: {made.total} prompts in {source}"
        if made.skipped:
            text += f"; {len(made.skipped)} skipped: {_reasons(made)}"
        if not made.usable:
            yield no(f"{text}. None is left to answer")
            continue
        yield note(text) if made.skipped else ok(text)
        yield from _cuts(run.recipe, made)
    return sets


def _read(made: PromptSet, recipe: Recipe, part: tuple[int, int], model: Model | None, tokenizer: Any) -> None:
    """Read the prompts as generation will see them. Raises SPPOError for what cannot be read."""
    prompts = load_prompts(made.source, recipe, part)
    made.total = len(prompts)
    made.ids = [p.prompt_id for p in prompts if not p.skip]
    if model is None or tokenizer is None:  # at least whether they can be read
        made.skipped = [p.skip for p in prompts if p.skip]
        made.usable = len(prompts) - len(made.skipped)
        return
    made.every = every = -(-len(prompts) // _LOOKED_AT)
    templated = to_requests(recipe, model.policy, tokenizer, prompts[::every])
    made.lengths = [len(r.token_ids) for r in templated.requests]
    made.rooms = [r.max_new_tokens for r in templated.requests]
    made.usable = min(every * len(templated.requests), len(prompts) - len(templated.skipped))
    made.conversations = list(templated.conversations.values())
    made.asked = list(templated.conversations)
    for one in templated.skipped:
        made.skipped += [one["reason"]] * every


def _reasons(made: PromptSet) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(made.skipped).most_common(5))


def _cuts(recipe: Recipe, made: PromptSet) -> Look[None]:
    """What the stages' limits cut of the prompts and of the responses that may come."""
    which, limit = made.which, recipe.max_prompt_length
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
            f"are drawn, {min(rooms)} to {max(rooms)} fit --max_length {recipe.max_length} beside the prompt; the "
            "end is cut, which is the answer of a model that thinks"
        )
    short = made.every * sum(room < recipe.maxlen for room in made.rooms)
    if short:
        yield note(f"{which}: {short} prompts leave less than --maxlen {recipe.maxlen} tokens of the model's context")


def check_held_out(recipe: Recipe, model: Model | None, tokenizer: Any) -> Look[None]:
    """The prompts of the report."""
    made = PromptSet(recipe.eval_prompts, [])
    _read(made, recipe, (0, 1), model, tokenizer)
    if not made.usable:
        yield no(f"--eval_prompts {made.source}: none of {made.total} can be answered: {_reasons(made)}")
        return
    if recipe.stop_when == "judge" and made.usable < FEWEST:
        yield no(
            f"--eval_prompts {made.source}: {made.usable} can be answered, and --stop_when judge decides on {FEWEST} "
            "or more; name more of them, some hundreds if you can"
        )
    text = f"{made.total} held-out prompts"
    text += f", {len(made.skipped)} skipped: {_reasons(made)}" if made.skipped else ""
    k = recipe.eval_pairs
    text += f"; {made.usable * k} responses a model, {2 * made.usable * k * k} comparisons a report"
    text += ", and as many with the iteration before" if recipe.judge and recipe.iterations > 1 else ""
    yield note(text) if made.skipped else ok(text)


def check_memory(run: Run, machines: Machines, shape: Shape, prompts: list[PromptSet]) -> Look[None]:
    # of the longest sequence, as far as the prompts are known
    longest = max((max(made.lengths) for made in prompts if made.lengths), default=run.recipe.max_prompt_length)
    tokens = longest + run.recipe.maxlen
    if run.cpu:
        yield _fits_main_memory(run, machines, shape, tokens)
    elif machines.cards:
        yield _fits_gpus(run.recipe, machines, shape, tokens)
    else:
        yield note("not compared with the model: that of the GPUs is not known")


def _fits_main_memory(run: Run, machines: Machines, shape: Shape, tokens: int) -> Finding:
    shards = len(run.gpus) // run.recipe.world_size
    vllm = pick_engine(run.recipe.engine) == "vllm"
    number = 4 if shape.parameters * shape.bytes > DOUBLE else 8  # bytes
    if vllm:
        number = {"bfloat16": 2, "float32": 4}.get(run.recipe.dtype, min(shape.bytes, 4))
    certain = number * shape.parameters * shards
    more = shape.cache(BATCH * tokens, number) * shards
    if vllm:  # as models/vllm.py gives it
        more = max(1 << 30, cpu_cache_bytes(shape.cache(tokens, number), machines.memory, shards)) * shards
    parts = f"weights in {many(shards, 'process')} and up to {{}} of keys and values"
    advice = "Take a smaller model, --maxlen or machine"
    return fits("generation", certain, more, machines.memory, parts, advice)


def _fits_gpus(recipe: Recipe, machines: Machines, shape: Shape, tokens: int) -> Finding:
    world_size, cards = recipe.world_size, machines.cards
    if shape.heads % world_size:
        return no(f"--world_size {world_size} does not divide the model's {shape.heads} attention heads")
    number = 4 if recipe.dtype == "float32" else 2  # bytes
    certain = number * shape.parameters / world_size
    parts = "weights on each GPU and {} for keys and values and the runtime"
    if pick_engine(recipe.engine) != "vllm":
        free = min(free for _, free in cards.values())
        more = shape.cache(BATCH * tokens) + RUNTIME
        return fits("generation", certain, more, free, parts, "Lower --maxlen, or take vLLM with a --world_size")

    share = recipe.gpu_memory_utilization
    for name, (total, free) in cards.items():
        if free < share * total:
            return no(
                f"generation: vLLM takes {share:g} of GPU {name}'s {size(total)}, of which {size(free)} is free; stop "
                f"what uses it, or --gpu_memory_utilization {int(100 * free / total) / 100:g}"
            )
    room = min(share * total for total, _ in cards.values())
    more = shape.cache(tokens, number) / world_size + RUNTIME  # one sequence at a time, at the least
    return fits("generation", certain, more, room, parts, f"Try --world_size {2 * world_size}, or lower --maxlen")

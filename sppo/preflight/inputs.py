"""What a run reads, looked at before it starts: model, tokenizer and template, prompts, ranker, held-out prompts."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo import chat
from sppo.config import Recipe
from sppo.errors import SPPOError
from sppo.files import read_json
from sppo.models import adapter_base, files_to_fetch, load_config, open_policy, parameters, pinned, weight_shapes
from sppo.preflight import plan
from sppo.preflight.checks import Finding, Findings, Iteration, Run, no, note, ok
from sppo.preflight.plan import size
from sppo.prompts import Message, load_prompts
from sppo.rankers import TRIAL, Pair, prompt_renderer

_SMALL_RANKER = 4 << 30  # bytes on disk up to which a ranker is loaded to see that it can be
_ANSWER = "sppo-answer-probe"


@dataclass
class PromptSet:
    """One iteration's prompts as generation will see them."""

    total: int
    usable: int
    lengths: list[int]  # tokens of each that can be answered; empty where no tokenizer is at hand
    rooms: list[int]  # tokens that each response may have
    conversations: list[list[Message]]

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)


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
        stored = _stored_weights(policy.weights, found)
        if not stored:
            raise SPPOError(f"model {wanted[-1][0]} has no .safetensors on the Hub; pickled weights are not read")
        count = stored // plan.stored_bytes(raw)
        run.downloads["model"] = sum(length for length, missing in found.values() if missing)
    else:
        count = parameters(weight_shapes(policy.weights))
    run.shape = plan.Shape.of(raw, count)
    context = policy.context()
    shown += f", {plan.count(count)}, context {context or 'unknown'}"
    shown += f", with the adapter {policy.adapter}" if policy.adapter else ""
    shown += f", {size(run.downloads['model'])} to download" if run.downloads else ""
    yield ok(shown)
    config = load_config(policy)
    if type(config) not in AutoModelForCausalLM._model_mapping and not policy.remote_code:
        yield no(f"{name} is a {raw.get('model_type')}, which transformers does not load as a causal model")
    if run.trains and context and run.recipe.max_length > context:
        yield note(f"--max_length {run.recipe.max_length} is beyond the model's context of {context} tokens")


def _stored_weights(directory: Path, files: dict[str, tuple[int, bool]]) -> int:
    """Bytes of a model's weights on the Hub: of those that its index names, if it has one."""
    index = directory / "model.safetensors.index.json"
    named = set(read_json(index)["weight_map"].values()) if index.exists() else files
    return sum(length for name, (length, _) in files.items() if name in named and name.endswith(".safetensors"))


def check_ranker_download(run: Run) -> Findings:
    """Nothing found, only counted: what is wrong with the ranker, its own check says."""
    from huggingface_hub import constants

    local = Path(run.recipe.ranker).expanduser().is_dir() or ":" in run.recipe.ranker
    if run.generates and not local and run.recipe.ranker_backend not in ("judge", "function"):
        recipe = pinned(run.recipe, run.run_dir / "iter1" / "data")
        try:
            found = {} if constants.HF_HUB_OFFLINE else files_to_fetch(recipe.ranker, recipe.ranker_revision)
        except Exception:  # noqa: BLE001 - check_ranker meets the same and tells it
            found = {}
        run.downloads["ranker"] = sum(length for length, missing in found.values() if missing)
    yield from ()


def check_tokenizer(run: Run) -> Findings:
    if run.policy is None:
        yield note("not looked at: the model cannot be read")
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
        yield note("the template does not render an assistant's answer as it is; others' data may not train")
        return
    yield _header(prompt, bare, before)
    yield from _end(run, tokenizer, behind)
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
    return note("the template renders a prompt otherwise once it is answered; others' data may not train")


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
    run.loads = [_load(run, i) for i in run.left if i.number in run.sets or (i.training and not i.data)]


def _prepared(run: Run, source: str, recipe: Recipe, part: tuple[int, int]) -> tuple[PromptSet, list[str]]:
    """(prompts as generation will see them, why others are skipped). Raises SPPOError for what cannot be read."""
    from sppo.generation import prepare

    prompts = load_prompts(source, recipe, part)
    if run.tokenizer is None:  # at least whether they can be read
        skipped = [p.skip for p in prompts if p.skip]
        return PromptSet(len(prompts), len(prompts) - len(skipped), [], [], []), skipped
    requests, conversations, left_out = prepare(recipe, run.policy, run.tokenizer, prompts)
    lengths, rooms = [len(r.token_ids) for r in requests], [r.max_new_tokens for r in requests]
    made = PromptSet(len(prompts), len(requests), lengths, rooms, list(conversations.values()))
    return made, [s["reason"] for s in left_out]


def _reasons(skipped: list[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(skipped).most_common(5))


def _cuts(run: Run, which: str, made: PromptSet) -> Findings:
    """What the stages' limits cut of the prompts and of the responses that may come."""
    recipe, limit = run.recipe, run.recipe.max_prompt_length
    if not made.lengths:
        return
    long = sum(length > limit for length in made.lengths)
    if long:
        yield note(f"{which}: {long} prompts are longer than --max_prompt_length {limit}; training cuts their left")
    rooms = [recipe.max_length - min(length, limit) for length in made.lengths]
    cut = sum(most > room for most, room in zip(made.rooms, rooms, strict=True))
    if cut:
        yield note(
            f"{which}: responses to {cut} prompts may be longer than training reads: up to {max(made.rooms)} tokens "
            f"are drawn, {min(rooms)} to {max(rooms)} fit --max_length {recipe.max_length} beside the prompt"
        )
    short = sum(room < recipe.maxlen for room in made.rooms)
    if short:
        yield note(f"{which}: {short} prompts leave less than --maxlen {recipe.maxlen} tokens of the model's context")


def _load(run: Run, i: Iteration) -> plan.Load:
    """The iteration's work: from its prompts, or, where its data is made, from what that holds."""
    recipe = run.recipe
    if i.data:
        made = run.sets[i.number]
        prompts, tokens, longest = made.usable, sum(made.lengths), made.longest
        rows, most = plan.training_rows(prompts, recipe.test_size), recipe.pairs * sum(made.rooms)
    else:
        data = run.run_dir / f"iter{i.number}" / "data"
        rows = prompts = read_json(data / "train.manifest.json")["counts"]["train"]
        manifest = data / "responses.manifest.json"  # not there where another tool made the responses
        counts = read_json(manifest)["counts"] if manifest.exists() else {}
        usual = rows * recipe.pairs * plan.TYPICAL_RESPONSE
        tokens, longest, most = 0, 0, counts.get("response_tokens", usual)
    steps = 0
    if run.training and run.training[2] and i.training:
        _, processes, accumulate = run.training
        steps = plan.steps(rows, recipe, processes, accumulate)
    return plan.Load(i.number, i.data, i.training, prompts, tokens, longest, most, rows, steps)


def check_ranker(run: Run) -> Findings:
    """Fetch the ranker, load it where it is small, and ask it something."""
    if not run.generates:
        return
    from sppo import rankers

    recipe = pinned(run.recipe, run.run_dir / "iter1" / "data")
    module = rankers.backend(recipe)
    kind = module.__name__.rpartition(".")[2]
    where = Path(module.fetch(recipe))
    if kind == "judge":
        yield ok(f"{recipe.ranker} at {recipe.ranker_url} answers a trial question")
        return
    if recipe.fused_attention and (run.cpu or importlib.util.find_spec("disentangled_flash") is None):
        yield no("--fused_attention needs a GPU and a package: pip install '.[fused]'; or leave it out")
    told = recipe.ranker
    if kind != "function":
        shapes = weight_shapes(where)
        run.ranker_parameters, run.ranker_reads_pairs = parameters(shapes), kind != "reward_model"
        on_disk = sum(f.stat().st_size for f in where.glob("*.safetensors"))
        told += f": {plan.count(run.ranker_parameters)}, {size(on_disk)}"
        room = min((free for _, free in run.cards.values()), default=0)
        if run.cards and 2 * run.ranker_parameters > room:
            yield no(f"{told}; {size(room)} of GPU memory is free, and each GPU loads all of it")
        if on_disk > _SMALL_RANKER:
            yield ok(f"{told}; its config, tokenizer and files are whole; not loaded, which would take long")
            return
    # on the CPU, with the prompt as text: the policy's weights may not be here yet
    ranker = module.load(dataclasses.replace(recipe, fused_attention=False, ranker_prompt="text"))
    one, other = _asked(ranker, [TRIAL, (TRIAL[0], TRIAL[2], TRIAL[1])], f"--ranker {recipe.ranker}")
    yield ok(f"{told}; it loads and answers a trial pair ({one:.3g}, {other:.3g} the other way round)")
    yield from _ranker_cuts(run, ranker)


def _ranker_cuts(run: Run, ranker: Any) -> Findings:
    """Prompts that the ranker reads only in part."""
    inputs = getattr(ranker, "inputs", None)
    if inputs is not None and run.tokenizer is not None:
        inputs.render = prompt_renderer(run.recipe, run.tokenizer)
    limit = f", and at least {inputs.candidate_maxlength - 3} tokens of a response" if inputs is not None else ""
    for made in {id(s): s for s in run.sets.values()}.values():
        which = ", ".join(str(n) for n, s in run.sets.items() if s is made)
        cut = sum(ranker.count_cut(messages, [""]) > 0 for messages in made.conversations)
        if cut:
            yield note(f"iteration {which}: the ranker reads {cut} of {made.usable} prompts in part{limit}")
        elif limit:
            yield ok(f"iteration {which}: the ranker reads all of each prompt{limit}")


def check_judge(run: Run) -> Findings:
    """The second judge, where a report is asked for."""
    name = run.recipe.judge
    if not name or not any(i.report for i in run.left):
        return
    from sppo.rankers.function import FunctionRanker, load_function

    (answer,) = _asked(FunctionRanker(load_function(name, "--judge")), [TRIAL], f"--judge {name}")
    yield ok(f"--judge {name} answers a trial pair ({answer:.3g})")


def _asked(ranker: Any, pairs: list[Pair], which: str) -> list[float]:
    """The ranker's logits of trial pairs. Raises SPPOError where it fails or one is not finite."""
    try:
        answers = dict(ranker.logits(pairs))
    except SPPOError as error:
        raise SPPOError(f"{which} fails on a trial pair: {error}") from None
    if not all(map(math.isfinite, answers.values())):
        raise SPPOError(f"{which} gives {list(answers.values())} for a trial pair, not finite numbers")
    return [answers[i] for i in range(len(pairs))]


def check_report(run: Run) -> Findings:
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

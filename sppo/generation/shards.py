"""K responses for every prompt of a shard."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError
from sppo.command.progress import progress
from sppo.generation.combine import combine
from sppo.generation.engines import Finished, Request, finished_responses, prompt_seed
from sppo.generation.prompts import Prompt
from sppo.generation.source import Source
from sppo.models import chat
from sppo.models.files import public_name
from sppo.models.frames import in_own_template
from sppo.models.policy import Policy
from sppo.recipe import Recipe
from sppo.schema import Message, responses_schema
from sppo.store.journal import Journal
from sppo.store.manifest import Stage
from sppo.store.parquet import write_parquet
from sppo.store.shards import Slice, lay_out


@dataclass
class _Work:
    """A shard that is not done: its requests, the conversations as they were templated, what is skipped and why."""

    stage: Stage
    requests: list[Request]
    conversations: dict[str, list[Message]]
    skipped: list[dict[str, str]]
    journal: Journal
    missing: int = 0  # requests that the journal does not hold


def generate_shards(
    recipe: Recipe, output_dir: Path, shards: list[Slice], part: tuple[int, int], world_size: int, overwrite: bool
) -> None:
    """Write $DATA/responses/shard-<data_frac>.parquet for each of `shards`, with one engine.

    Finished prompts of an earlier, killed try are kept. A shard that holds all prompts is the only one:
    $DATA/responses.parquet is made of it at once.
    """
    source = Source.of(recipe, part, output_dir)
    directory, missing = output_dir / "responses", []
    for shard in shards:
        stage = source.stage(output_dir, shard)
        if overwrite:
            stage.discard()
        if stage.is_current():
            stage.remove_leftovers()
            print(f"generate: shard {shard.data_frac} is done: {stage.outputs[0]}")
        else:
            stage.refuse_foreign()
            missing.append(stage)
    if missing:
        source.keep(output_dir)
        lay_out(directory, shards[0].count(source.total), overwrite)
        first, last = shards[0].data_frac, shards[-1].data_frac
        _generate(source, missing, f"shard {first}" if first == last else f"shards {first} to {last}", world_size)
    rows = source.stage(output_dir, shards[0]).settings["rows"]
    if len(shards) == shards[0].numgpu == 1 and rows == [0, source.total]:
        combine(output_dir, 1, recipe.pairs, overwrite)


def _generate(source: Source, stages: list[Stage], label: str, world_size: int) -> None:
    """Draw what the shards' journals do not hold, and write each shard as soon as it is whole."""
    recipe, policy, engine = source.recipe, source.policy, stages[0].settings["engine"]
    tokenizer = policy.tokenizer()
    stops, identity = policy.stop_ids(tokenizer), chat.tokenizer_identity(tokenizer)
    total = source.total
    works: list[_Work] = []
    for stage in stages:
        start, stop = stage.settings["rows"]
        requests, conversations, skipped = prepare(recipe, policy, tokenizer, source.rows(start, stop))
        policy.check_tokens(max((max(r.token_ids) for r in requests), default=0))
        if not requests and stop - start == total:  # a shard among others may have none
            raise SPPOError(f"no prompt can be answered; skipped: {dict(Counter(s['reason'] for s in skipped))}")
        for request in requests:
            request.logps = request.prompt_id in source.sampled
        stage.begin()
        journal = Journal(stage.journal, stage.identity)
        if not chat.is_fixed(tokenizer):
            _forget_unread(journal)
        left = sum(r.prompt_id not in journal.done for r in requests)
        works.append(_Work(stage, requests, conversations, skipped, journal, left))
        counts = f"{left} to do, {len(requests) - left} in the journal, {len(skipped)} skipped"
        print(f"generate: rows {start} to {stop} of {total}: {counts}; engine {engine}", flush=True)
    owners = {r.prompt_id: work for work in works for r in work.requests}
    asked = [r for work in works for r in work.requests if r.prompt_id not in work.journal.done]
    asked.sort(key=lambda r: not r.logps)  # the sample first: only while it is drawn does the engine work out log-probs
    for work in works:
        if not work.missing:
            _finish_shard(source, work, identity)
    with progress(len(owners), label, "prompt", len(owners) - len(asked)) as bar:
        finished = finished_responses(engine, policy, recipe, stops, asked, world_size)
        for request in _drawn(finished, tokenizer, owners, recipe, bar):
            work = owners[request.prompt_id]
            work.missing -= 1
            if not work.missing:
                _finish_shard(source, work, identity)


def _forget_unread(journal: Journal) -> None:
    """Leave out what older versions kept without the prompt's token ids: a template with a date makes others by now."""
    for key in [key for key in journal.done if "prompt_token_ids" not in journal.read(key)]:
        del journal.done[key]


def _finish_shard(source: Source, work: _Work, identity: str) -> None:
    """Write a shard that is whole, and its manifest."""
    recipe, stage = source.recipe, work.stage
    start, stop = stage.settings["rows"]
    counts = _write_shard(stage.outputs[0], work.requests, work.conversations, work.journal, identity)
    reasons = Counter(s["reason"] for s in work.skipped)
    summary = {"prompts": stop - start, **counts, "skipped": dict(reasons)}
    read = ("prompts", "prompts_revision", "prompt_column", "prompt_split")
    origin = {**{k: getattr(recipe, k) for k in read}, "part": list(source.part)}
    names = {"model": public_name(recipe.model), "prompts": public_name(recipe.prompts)}  # for the Hub
    stage.finish(summary, model=recipe.model, source=origin, names=names, skipped=work.skipped)
    work.journal.remove()
    print(f"generate: {stage.outputs[0]}: {json.dumps(summary)}")


def _drawn(finished: Finished, tokenizer: Any, owners: dict[str, _Work], recipe: Recipe, bar: Any) -> Iterator[Request]:
    """Put each prompt's responses into its shard's journal as it finishes, and name it."""
    tokens = 0
    for request, responses in finished:
        if len(responses) != recipe.pairs:
            raise SPPOError(f"the engine gave {len(responses)} responses, not {recipe.pairs}, to {request.prompt_id}")
        answer = []
        for r in responses:
            text_ids = r.token_ids[:-1] if r.finish_reason == "stop" else r.token_ids
            text = tokenizer.decode(text_ids, skip_special_tokens=True)
            item = {"text": text, "token_ids": r.token_ids, "finish_reason": r.finish_reason}
            # rounded, so that the batch, which decides the last bits, decides nothing here
            answer.append(item if r.logps is None else {**item, "logps": [round(x, 5) for x in r.logps]})
        read = {"prompt_token_ids": list(request.token_ids)}  # kept, not made again: a template may hold the date
        owners[request.prompt_id].journal.add(request.prompt_id, {**read, "responses": answer})
        tokens += sum(len(r.token_ids) for r in responses)
        bar.update()
        bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s", refresh=False)
        yield request


def _write_shard(
    path: Path, requests: list[Request], conversations: dict[str, list[Message]], journal: Journal, identity: str
) -> dict[str, int]:
    """The journal's responses in the prompts' order; returns what was counted on the way."""
    counts = dict.fromkeys(("written", "responses", "response_tokens", "cut_at_maxlen"), 0)

    def rows() -> Any:
        for request in requests:
            kept = journal.read(request.prompt_id)
            answer = kept["responses"]
            counts["written"] += 1
            counts["responses"] += len(answer)
            counts["response_tokens"] += sum(len(r["token_ids"]) for r in answer)
            counts["cut_at_maxlen"] += sum(r["finish_reason"] == "length" for r in answer)
            yield {
                "prompt_id": request.prompt_id,
                "prompt": conversations[request.prompt_id],
                "responses": answer,
                "prompt_token_ids": kept.get("prompt_token_ids", list(request.token_ids)),  # older journals have none
                "tokenizer": identity,
            }

    write_parquet(path, responses_schema(), rows())
    return counts


def prepare(
    recipe: Recipe, policy: Policy, tokenizer: Any, prompts: list[Prompt]
) -> tuple[list[Request], dict[str, list[Message]], list[dict[str, str]]]:
    """Requests for the engine, the conversations as they were templated, and what is skipped and why."""
    context = policy.context()
    requests, conversations, skipped = [], {}, []
    for prompt in prompts:
        reason, ids = prompt.skip or in_own_template(tokenizer, prompt.messages), []
        if not reason:
            try:
                messages = chat.with_system(tokenizer, prompt.messages, recipe.system_prompt)
                ids = chat.prompt_ids(tokenizer, messages, recipe.chat_template_kwargs)
            except ValueError as error:
                reason = str(error)
            else:
                reason = "" if ids else "the chat template makes nothing of it"
        if ids and context and len(ids) >= context:
            reason = "too long for the model's context"
        if reason:
            skipped.append({"prompt_id": prompt.prompt_id, "reason": reason})
            continue
        room = min(recipe.maxlen, context - len(ids)) if context else recipe.maxlen
        requests.append(Request(prompt.prompt_id, array("i", ids), prompt_seed(recipe.seed, prompt.prompt_id), room))
        conversations[prompt.prompt_id] = messages
    return requests, conversations, skipped

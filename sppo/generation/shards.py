"""K responses for every prompt of a shard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.command.errors import SPPOError
from sppo.command.progress import progress
from sppo.generation.combine import OF_THOUGHTS, combine
from sppo.generation.engines import Request, Response, finished_responses
from sppo.generation.source import Source, as_begun
from sppo.generation.templating import Templated, to_requests
from sppo.models import chat
from sppo.models.files import public_name
from sppo.models.thoughts import Budget, Marks, marks_of, split
from sppo.recipe import Recipe, parse_part
from sppo.schema import has_answer, responses_schema
from sppo.store.journal import Journal
from sppo.store.manifest import Stage
from sppo.store.parquet import write_parquet
from sppo.store.shards import Slice, lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class _Shard:
    """A shard that is not done: its prompts, and a journal of the responses that are drawn already."""

    stage: Stage
    prompts: Templated
    journal: Journal
    missing: int  # requests that the journal does not hold

    @property
    def left(self) -> list[Request]:
        return [request for request in self.prompts.requests if request.prompt_id not in self.journal.done]


def generate_shards(recipe: Recipe, output_dir: Path, shards: list[Slice], overwrite: bool) -> None:
    """Write $DATA/responses/shard-<data_frac>.parquet for each of `shards`, with one engine.

    Finished prompts of an earlier, killed try are kept. A shard that holds all prompts is the only one:
    $DATA/responses.parquet is made of it at once.
    """
    source = Source.of(as_begun(recipe, output_dir, overwrite))
    total = len(source.prompts)
    stages = [source.stage(output_dir, shard) for shard in shards]
    source.check_extras()  # before --overwrite deletes anything
    source.check_dtype()
    source.check_marks()
    missing = [stage for stage in stages if stage.make_ready(overwrite)]
    if missing:
        lay_out(output_dir / "responses", shards[0].count(total), overwrite)
        first, last = shards[0].data_frac, shards[-1].data_frac
        _generate(source, missing, f"shard {first}" if first == last else f"shards {first} to {last}")

    if len(shards) == shards[0].numgpu == 1 and stages[0].settings["rows"] == [0, total]:
        combine(output_dir, 1, recipe.pairs, overwrite, recipe=recipe)


def _generate(source: Source, stages: list[Stage], label: str) -> None:
    """Draw what the shards' journals do not hold, and write each shard as soon as it is whole."""
    recipe, policy, engine = source.recipe, source.policy, stages[0].settings["engine"]
    tokenizer = policy.tokenizer()
    stop_ids, identity = policy.stop_ids(tokenizer), chat.tokenizer_identity(tokenizer)
    marks = marks_of(tokenizer, stop_ids, recipe.chat_template_kwargs, recipe.thinking_tags)
    budget = Budget(recipe.thinking_budget, marks, tokenizer) if marks and recipe.thinking_budget else None

    shards = [_begin(source, stage, tokenizer) for stage in stages]
    for shard in shards:
        if not shard.missing:
            _finish(source, shard, identity)

    shard_of = {request.prompt_id: shard for shard in shards for request in shard.prompts.requests}
    requests = [request for shard in shards for request in shard.left]
    # those with log-probs first: an engine is slower as long as it works out any
    requests.sort(key=lambda request: not request.logps)

    tokens = 0
    with progress(len(shard_of), label, "prompt", len(shard_of) - len(requests)) as bar:
        for request, responses in finished_responses(engine, policy, recipe, stop_ids, requests, budget):
            if len(responses) != recipe.pairs:
                found = f"{len(responses)} responses, not {recipe.pairs}"
                raise SPPOError(f"the engine gave {found}, to {request.prompt_id}")
            shard = shard_of[request.prompt_id]
            shard.journal.add(request.prompt_id, _kept(request, responses, tokenizer, marks))
            tokens += sum(len(response.token_ids) for response in responses)
            bar.update()
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s", refresh=False)

            shard.missing -= 1
            if not shard.missing:
                _finish(source, shard, identity)


def _begin(source: Source, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> _Shard:
    """Template a shard's prompts and open its journal. Raises SPPOError where no prompt of all can be answered."""
    (start, stop), total = stage.settings["rows"], len(source.prompts)
    prompts = to_requests(source.recipe, source.policy, tokenizer, source.prompts[start:stop])
    source.policy.check_tokens(max((max(request.token_ids) for request in prompts.requests), default=0))
    if not prompts.requests and stop - start == total:  # a shard among others may have none
        reasons = dict(Counter(one["reason"] for one in prompts.skipped))
        raise SPPOError(f"no prompt can be answered; skipped: {reasons}")
    for request in prompts.requests:
        request.logps = request.prompt_id in source.sampled

    stage.begin()
    journal = stage.open_journal()
    first = next(iter(journal.done), None)
    if first is not None and "prompt_token_ids" not in journal.read(first):
        raise SPPOError(f"{journal.path} is of an older version; move it away, and its prompts are drawn again")
    shard = _Shard(stage, prompts, journal, 0)
    shard.missing = len(shard.left)
    counts = f"{shard.missing} to do, {len(prompts.requests) - shard.missing} in the journal"
    print(
        f"generate: rows {start} to {stop} of {total}: {counts}, {len(prompts.skipped)} skipped; "
        f"engine {stage.settings['engine']}" + "".join(f"; the date is {date}" for date in source.date.values()),
        flush=True,
    )
    return shard


def _kept(
    request: Request, responses: list[Response], tokenizer: PreTrainedTokenizerBase, marks: Marks | None
) -> dict[str, Any]:
    """What the journal keeps of a prompt. Its token ids too: a template that writes the date makes others tomorrow."""
    kept = []
    marks = marks.of_prompt(tokenizer, request.token_ids) if marks else None
    for response in responses:
        ids = response.token_ids
        text_ids = ids[:-1] if response.finish_reason == "stop" else ids
        found = split(marks, tokenizer, ids) if marks else None
        text = found.text if found else tokenizer.decode(text_ids, skip_special_tokens=True)
        one = {"text": text, "token_ids": ids, "finish_reason": response.finish_reason}
        if response.logps is not None:
            one["logps"] = [round(x, 5) for x in response.logps]  # the batch decides the digits behind these
        if found and found.thought is not None:
            one |= {"thought": found.thought, "thought_tokens": found.thought_tokens}
        kept.append(one)
    cut = sum(response.is_thought_cut for response in responses)
    return {"prompt_token_ids": list(request.token_ids), "responses": kept, **({"thoughts_cut": cut} if cut else {})}


def _finish(source: Source, shard: _Shard, identity: str) -> None:
    """Write a shard that is whole, and its manifest."""
    recipe, stage, skipped = source.recipe, shard.stage, shard.prompts.skipped
    counts: dict[str, int] = dict.fromkeys(("written", "responses", "response_tokens", "cut_at_maxlen"), 0)
    if "thinking" in stage.settings:
        counts |= dict.fromkeys(OF_THOUGHTS, 0)
    write_parquet(stage.outputs[0], responses_schema(), _rows(shard, identity, counts))

    start, stop = stage.settings["rows"]
    summary = {"prompts": stop - start, **counts, "skipped": dict(Counter(one["reason"] for one in skipped))}
    read = ("prompts", "prompts_revision", "prompt_column", "prompt_split")
    origin = {**{k: getattr(recipe, k) for k in read}, "part": list(parse_part(recipe.prompts_part))}
    names = {"model": public_name(recipe.model), "prompts": public_name(recipe.prompts)}  # for the Hub
    stage.finish(summary, model=recipe.model, source=origin, names=names, skipped=skipped)
    shard.journal.remove()
    print(f"generate: {stage.outputs[0]}: {json.dumps(summary)}")


def _rows(shard: _Shard, identity: str, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The journal's responses in the prompts' order; adds to `counts` what passes."""
    for request in shard.prompts.requests:
        kept = shard.journal.read(request.prompt_id)
        responses = kept["responses"]
        counts["written"] += 1
        counts["responses"] += len(responses)
        counts["response_tokens"] += sum(len(r["token_ids"]) for r in responses)
        counts["cut_at_maxlen"] += sum(r["finish_reason"] == "length" for r in responses)
        if "thought_tokens" in counts:
            counts["thought_tokens"] += sum(r.get("thought_tokens") or 0 for r in responses)
            counts["unfinished_thoughts"] += sum(not has_answer(r) for r in responses)
            counts["thoughts_cut_at_budget"] += kept.get("thoughts_cut", 0)
        yield {
            "prompt_id": request.prompt_id,
            "prompt": shard.prompts.conversations[request.prompt_id],
            "responses": responses,
            "prompt_token_ids": kept["prompt_token_ids"],
            "tokenizer": identity,
            "prompt_thoughts": shard.prompts.thoughts.get(request.prompt_id),
        }

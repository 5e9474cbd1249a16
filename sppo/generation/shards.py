"""K responses for every prompt of a shard."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo.common import chat
from sppo.common.cores import Watch, without_gpu
from sppo.common.errors import SPPOError
from sppo.common.journal import Journal
from sppo.common.manifest import Stage
from sppo.common.model_files import public_name
from sppo.common.parquet import write_parquet
from sppo.common.policy import Policy, policy_of
from sppo.common.progress import progress
from sppo.common.shards import Slice, shard_paths
from sppo.config import Recipe
from sppo.formats import Message, responses_schema
from sppo.generation.combine import combine
from sppo.generation.engines import Finished, Request, finished_responses, pick_engine, prompt_seed
from sppo.generation.prompts import Prompt, fingerprint, load_prompts

# Prompts of an iteration whose responses keep the engine's log-probs, for the trainer to compare with its own.
SAMPLED = 32
_LONG_ENOUGH = 5.0  # seconds, before which nothing is said about a busy machine


@dataclass
class Source:
    """What the shards of one generation share: the policy, the prompts, and the fingerprints of both."""

    recipe: Recipe
    part: tuple[int, int]
    policy: Policy
    prompts: list[Prompt]
    inputs: dict[str, Any]

    @classmethod
    def of(cls, recipe: Recipe, part: tuple[int, int]) -> Source:
        """The recipe's policy and prompts; of the prompts every n-th from the i-th on, part = (i, n)."""
        policy, prompts = policy_of(recipe), load_prompts(recipe.prompts, recipe, part)
        inputs = {"model": policy.identity(), "prompts": fingerprint(prompts), "prompts_total": len(prompts)}
        return cls(recipe, part, policy, prompts, inputs)

    def stage(self, output_dir: Path, shard: Slice) -> Stage:
        """The stage that makes a shard."""
        keys = "pairs temperature top_p maxlen seed prompt_seeds system_prompt chat_template_kwargs".split()
        path, manifest, journal = shard_paths(output_dir / "responses", shard.data_frac)
        rows, engine = list(shard.bounds(len(self.prompts))), pick_engine(self.recipe.engine)
        settings = {"rows": rows, "engine": engine, **{k: getattr(self.recipe, k) for k in keys}}
        return Stage("generate", manifest, [path], self.inputs, settings, journal)

    def sampled(self) -> set[str]:
        """The prompts whose responses keep the engine's log-probs: the same, however the shards are cut."""
        ids = sorted((p.prompt_id for p in self.prompts), key=lambda i: prompt_seed(self.recipe.seed, i))
        return set(ids[:SAMPLED])


def generate_shard(
    recipe: Recipe, output_dir: Path, shard: Slice, part: tuple[int, int], world_size: int, overwrite: bool
) -> None:
    """Write $DATA/responses/shard-<data_frac>.parquet. Finished prompts of an earlier, killed try are kept.

    A shard that holds all prompts is the only one: $DATA/responses.parquet is made of it at once.
    """
    source = Source.of(recipe, part)
    stage = source.stage(output_dir, shard)
    start, stop = stage.settings["rows"]
    path = stage.outputs[0]
    if stage.is_done(overwrite):
        print(f"generate: shard {shard.data_frac} is done: {path}")
    else:
        stage.begin()
        _generate(source, stage, shard.data_frac, world_size)
    if shard.numgpu == 1 and shard.data_frac == 0 and stop - start == len(source.prompts):
        combine(output_dir, 1, recipe.pairs, overwrite)


def _generate(source: Source, stage: Stage, number: int, world_size: int) -> None:
    """Draw what the journal does not hold, and write the shard."""
    recipe, policy, engine = source.recipe, source.policy, stage.settings["engine"]
    (start, stop), total, path = stage.settings["rows"], len(source.prompts), stage.outputs[0]
    tokenizer = policy.tokenizer()
    stops = policy.stop_ids(tokenizer)
    requests, conversations, skipped = prepare(recipe, policy, tokenizer, source.prompts[start:stop])
    policy.check_tokens(max((max(r.token_ids) for r in requests), default=0))
    sample = source.sampled()
    for request in requests:
        request.logps = request.prompt_id in sample
    if not requests and stop - start == total:  # a shard among others may have none
        raise SPPOError(f"no prompt can be answered; skipped: {dict(Counter(s['reason'] for s in skipped))}")
    journal = Journal(stage.journal, stage.identity)
    # the sample first: only while it is drawn does the engine work out log-probs
    missing = sorted((r for r in requests if r.prompt_id not in journal.done), key=lambda r: not r.logps)
    kept = len(requests) - len(missing)
    print(f"generate: rows {start} to {stop} of {total}: {len(missing)} to do, {kept} in the journal, ", end="")
    print(f"{len(skipped)} skipped; engine {engine}", flush=True)
    with progress(len(requests), f"shard {number}", "prompt", kept) as bar:
        finished = finished_responses(engine, policy, recipe, stops, missing, world_size)
        _draw(_watched(finished) if without_gpu() else finished, tokenizer, journal, recipe, bar)
    counts = _write_shard(path, requests, conversations, journal, chat.tokenizer_identity(tokenizer))
    reasons = Counter(s["reason"] for s in skipped)
    summary = {"prompts": stop - start, **counts, "skipped": dict(reasons)}
    read = ("prompts", "prompts_revision", "prompt_column", "prompt_split")
    origin = {**{k: getattr(recipe, k) for k in read}, "part": list(source.part)}
    names = {"model": public_name(recipe.model), "prompts": public_name(recipe.prompts)}  # for the Hub
    stage.finish(summary, model=recipe.model, source=origin, names=names, skipped=skipped)
    journal.remove()
    print(f"generate: {path}: {json.dumps(summary)}")


def _watched(finished: Finished) -> Finished:
    """The same, with a warning, once, where other programs need the cores on which the engine draws."""
    watch, warned = Watch(), False
    for each in finished:
        if not warned and watch.seconds() > _LONG_ENOUGH and (said := watch.warning()):
            print(f"\ngenerate: warning: {said}", flush=True)
            warned = True
        yield each


def _draw(finished: Finished, tokenizer: Any, journal: Journal, recipe: Recipe, bar: Any) -> None:
    """Put each prompt's responses into the journal as it finishes."""
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
        journal.add(request.prompt_id, {"responses": answer})
        tokens += sum(len(r.token_ids) for r in responses)
        bar.update()
        bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s", refresh=False)


def _write_shard(
    path: Path, requests: list[Request], conversations: dict[str, list[Message]], journal: Journal, identity: str
) -> dict[str, int]:
    """The journal's responses in the prompts' order; returns what was counted on the way."""
    counts = dict.fromkeys(("written", "responses", "response_tokens", "cut_at_maxlen"), 0)

    def rows() -> Any:
        for request in requests:
            answer = journal.read(request.prompt_id)["responses"]
            counts["written"] += 1
            counts["responses"] += len(answer)
            counts["response_tokens"] += sum(len(r["token_ids"]) for r in answer)
            counts["cut_at_maxlen"] += sum(r["finish_reason"] == "length" for r in answer)
            yield {
                "prompt_id": request.prompt_id,
                "prompt": conversations[request.prompt_id],
                "responses": answer,
                "prompt_token_ids": list(request.token_ids),
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
        reason, ids = prompt.skip, []
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

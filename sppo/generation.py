"""Stage 1: K responses for every prompt of a shard, and the shards put together."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo import chat
from sppo.config import Recipe
from sppo.engines import Finished, Request, finished_responses, pick_engine, prompt_seed
from sppo.errors import SPPOError, UsageError
from sppo.files import Journal, digest, read_rows, write_parquet
from sppo.manifest import Stage, read_manifest
from sppo.models import Policy, policy_of, public_name
from sppo.progress import progress
from sppo.prompts import Message, Prompt, fingerprint, load_prompts

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ["prompt_id", "prompt", "responses", "prompt_token_ids", "tokenizer"]


def responses_schema() -> pa.Schema:
    """Columns of responses.parquet and its shards. The last two are ours; others' files may lack them."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    response = pa.struct([("text", pa.string()), ("token_ids", pa.list_(pa.int32())), ("finish_reason", pa.string())])
    return pa.schema(
        [
            ("prompt_id", pa.string()),
            ("prompt", pa.list_(message)),
            ("responses", pa.list_(response)),
            ("prompt_token_ids", pa.list_(pa.int32())),
            ("tokenizer", pa.string()),  # chat.tokenizer_identity: whose token ids these are
        ]
    )


@dataclass
class Slice:
    """Which rows of N are this shard's: [data_frac * frac_len, (data_frac + 1) * frac_len), 0 meaning all.

    Without a frac_len, `numgpu` shards share them evenly: frac_len = ceil(N / numgpu).
    """

    frac_len: int
    data_frac: int
    numgpu: int = 1

    def bounds(self, total: int) -> tuple[int, int]:
        if self.data_frac < 0 or self.frac_len < 0 or self.numgpu < 1:
            raise UsageError("--frac_len and --data_frac are 0 or more, --numgpu 1 or more")
        length = self.frac_len or -(-total // self.numgpu)
        if not self.frac_len and self.data_frac >= self.numgpu:
            raise UsageError(f"--data_frac {self.data_frac} is beyond --numgpu {self.numgpu}; the first is 0")
        return min(self.data_frac * length, total), min((self.data_frac + 1) * length, total)


def shard_paths(directory: Path, shard: int) -> tuple[Path, Path, Path]:
    """(Parquet, manifest, journal) of a shard."""
    stem = f"shard-{shard:05d}"
    return directory / f"{stem}.parquet", directory / f"{stem}.manifest.json", directory / f"{stem}.journal"


def generate_shard(
    recipe: Recipe, output_dir: Path, part: Slice, prompts_part: tuple[int, int], world_size: int, overwrite: bool
) -> None:
    """Write $DATA/responses/shard-<data_frac>.parquet. Finished prompts of an earlier, killed try are kept."""
    policy = policy_of(recipe)
    prompts = load_prompts(recipe.prompts, recipe, prompts_part)
    start, stop = part.bounds(len(prompts))
    engine = pick_engine(recipe.engine)
    path, manifest, journal_path = shard_paths(output_dir / "responses", part.data_frac)
    keys = "pairs temperature top_p maxlen seed prompt_seeds system_prompt chat_template_kwargs".split()
    stage = Stage(
        "generate",
        manifest,
        [path],
        inputs={"model": policy.identity(), "prompts": fingerprint(prompts), "prompts_total": len(prompts)},
        settings={"rows": [start, stop], "engine": engine, **{k: getattr(recipe, k) for k in keys}},
        journal=journal_path,
    )
    if stage.is_done(overwrite):
        print(f"generate: shard {part.data_frac} is done: {path}")
        return
    tokenizer = policy.tokenizer()
    stops = policy.stop_ids(tokenizer)
    requests, conversations, skipped = prepare(recipe, policy, tokenizer, prompts[start:stop])
    policy.check_tokens(max((max(r.token_ids) for r in requests), default=0))
    if not requests and stop - start == len(prompts):  # a shard among others may have none
        raise SPPOError(f"no prompt can be answered; skipped: {dict(Counter(s['reason'] for s in skipped))}")
    stage.begin()
    journal = Journal(journal_path, stage.identity)
    missing = [r for r in requests if r.prompt_id not in journal.done]
    kept = len(requests) - len(missing)
    print(f"generate: rows {start} to {stop} of {len(prompts)}: {len(missing)} to do, {kept} in the journal, ", end="")
    print(f"{len(skipped)} skipped; engine {engine}", flush=True)
    with progress(len(requests), f"shard {part.data_frac}", "prompt", kept) as bar:
        _draw(finished_responses(engine, policy, recipe, stops, missing, world_size), tokenizer, journal, recipe, bar)
    counts = _write_shard(path, requests, conversations, journal, chat.tokenizer_identity(tokenizer))
    reasons = Counter(s["reason"] for s in skipped)
    summary = {"prompts": stop - start, **counts, "skipped": dict(reasons)}
    read = ("prompts", "prompts_revision", "prompt_column", "prompt_split")
    source = {**{k: getattr(recipe, k) for k in read}, "part": list(prompts_part)}
    names = {"model": public_name(recipe.model), "prompts": public_name(recipe.prompts)}  # for the Hub
    stage.finish(summary, model=recipe.model, source=source, names=names, skipped=skipped)
    journal.remove()
    print(f"generate: {path}: {json.dumps(summary)}")


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
            answer.append({"text": text, "token_ids": r.token_ids, "finish_reason": r.finish_reason})
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


def combine(output_dir: Path, numgpu: int, pairs: int, overwrite: bool, frac_len: int = 0) -> None:
    """Put the shards 0..numgpu-1 together into $DATA/responses.parquet.

    Raises SPPOError unless the shards were made alike, cover every prompt exactly once, and hold K responses each.
    """
    if numgpu < 1:
        raise UsageError(f"--numgpu {numgpu}: 1 or more")
    directory = output_dir / "responses"
    shards = [shard_paths(directory, i)[:2] for i in range(numgpu)]
    extra = sorted(p.name for p in directory.glob("shard-*.parquet") if p not in [s[0] for s in shards])
    if extra:
        raise SPPOError(
            f"{directory} holds shards beyond --numgpu {numgpu}: {', '.join(extra)}; another run's? Move them away"
        )
    absent = [str(m) for _, m in shards if not m.exists()]
    if absent:
        raise SPPOError(f"shards that are not finished: {', '.join(absent)}; run generate.py for them")
    manifests = [read_manifest(m) for _, m in shards]
    _check_alike(manifests, directory, pairs)
    first, last = manifests[0]["settings"]["rows"]
    if frac_len and last - first != min(frac_len, manifests[0]["inputs"]["prompts_total"]):
        raise SPPOError(f"{directory}: the shards have {last - first} rows, not --frac_len {frac_len}")
    path = output_dir / "responses.parquet"
    stage = Stage(
        "combine",
        output_dir / "responses.manifest.json",
        [path],
        inputs={p.name: digest(p) for p, _ in shards},
        settings={"pairs": pairs},
    )
    for (shard, _), manifest in zip(shards, manifests, strict=True):
        if manifest["outputs"].get(shard.name) != stage.inputs[shard.name]:
            raise SPPOError(f"{shard} changed after it was written; delete it and run generate.py again")
    if stage.is_done(overwrite):
        print(f"combine: done: {path}")
        return
    stage.begin()
    seen: set[str] = set()

    def rows() -> Any:
        for shard, _ in shards:
            for row in read_rows(shard, COLUMNS):
                if row["prompt_id"] in seen or len(row["responses"]) != pairs:
                    raise SPPOError(f"{shard}: prompt {row['prompt_id']} is there twice or without {pairs} responses")
                seen.add(row["prompt_id"])
                yield row

    written = write_parquet(path, responses_schema(), rows())
    skipped = [s for m in manifests for s in m["skipped"]]
    total = manifests[0]["inputs"]["prompts_total"]
    if written + len(skipped) != total:
        path.unlink()
        raise SPPOError(f"{written} prompts answered and {len(skipped)} skipped are not the {total} that there are")
    if not written:
        path.unlink()
        raise SPPOError(f"no prompt was answered; skipped: {dict(Counter(s['reason'] for s in skipped))}")
    counts: dict[str, Any] = {"prompts": total, "skipped": dict(Counter(s["reason"] for s in skipped))}
    for key in ("written", "responses", "response_tokens", "cut_at_maxlen"):
        counts[key] = sum(m["counts"][key] for m in manifests)
    generated = {**manifests[0]["settings"], **manifests[0]["inputs"], "model_name": manifests[0]["model"]}
    generated["source"] = manifests[0]["source"]
    generated["names"] = manifests[0].get("names", {})
    generated.pop("rows")
    stage.finish(counts, skipped=skipped, generated=generated)
    print(f"combine: {path}: {json.dumps(counts)}")


def _check_alike(manifests: list[dict[str, Any]], directory: Path, pairs: int) -> None:
    def common(manifest: dict[str, Any]) -> dict[str, Any]:
        return {**manifest["inputs"], **{k: v for k, v in manifest["settings"].items() if k != "rows"}}

    first = common(manifests[0])
    for number, manifest in enumerate(manifests):
        differing = [k for k, v in common(manifest).items() if first.get(k) != v]
        if differing:
            raise SPPOError(f"{directory}: shards 0 and {number} differ in {', '.join(differing)}; generate them alike")
    if first["pairs"] != pairs:
        raise SPPOError(f"{directory}: the shards hold {first['pairs']} responses a prompt, not --pairs {pairs}")
    expected = 0
    for number, manifest in enumerate(manifests):
        start, stop = manifest["settings"]["rows"]
        if start != expected:
            raise SPPOError(
                f"{directory}: shard {number} starts at row {start}, not {expected}; check --frac_len and --data_frac"
            )
        expected = stop
    if expected != first["prompts_total"]:
        raise SPPOError(
            f"{directory}: the shards end at row {expected} of {first['prompts_total']}; some were not generated"
        )


def check_prompts(output_dir: Path, prompts: str | None) -> None:
    """Raise SPPOError unless responses.parquet was made from `prompts` as they are now. None checks nothing."""
    if prompts is None:
        return
    manifest = output_dir / "responses.manifest.json"
    if not manifest.exists():
        raise SPPOError(f"--prompts: {manifest} is not there, so nothing says what the responses were made from")
    generated = read_manifest(manifest, "generated")["generated"]
    source = dict(generated["source"])
    first, parts = source.pop("part")
    source["prompts"] = prompts
    if fingerprint(load_prompts(prompts, Recipe(**source), (first, parts))) != generated["prompts"]:
        raise SPPOError(f"the responses in {output_dir} were not made from {prompts} as it is now; generate them again")

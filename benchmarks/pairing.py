"""Pairing: how fast scripts/compute_prob.py is, and its peak memory, as the number of prompts grows.

    python benchmarks/pairing.py --prompts 10000 100000 1000000
    python benchmarks/pairing.py --prompts 100000 --shuffle --test_size 0.01

Reads   nothing: makes responses and ranking shards, in a process of their own.
Writes  a temporary directory ($TMPDIR), removed at the end: about 4 GiB for a million prompts at 60 tokens a response.
        Prints a table.
Exit codes: 0 done, 1 failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the of and to in is that for it as was with be by on not he his but at are this have from or had an".split()
ROWS = 512  # in a row group


def make(directory: Path, prompts: int, pairs: int, tokens: int, shuffle: bool) -> None:
    """responses.parquet and ranking/shard-*.parquet (8 of them), written as they are drawn."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from sppo.schema import ranking_schema, responses_schema

    rng = np.random.default_rng(0)
    words = pa.array(WORDS)

    def texts(count: int, mean: int) -> tuple[pa.Array, pa.Array]:
        """(texts, token ids), mean/2 to 3/2 mean words each."""
        offsets = np.concatenate([[0], rng.integers(mean // 2, mean * 3 // 2 + 1, count).cumsum()]).astype(np.int32)
        drawn = words.take(pa.array(rng.integers(0, len(WORDS), offsets[-1])))
        ids = pa.array(rng.integers(0, 32000, offsets[-1], dtype=np.int32))
        joined = pc.binary_join(pa.ListArray.from_arrays(offsets, drawn), " ")
        return joined, pa.ListArray.from_arrays(offsets, ids)

    def lists(values: pa.Array, length: int) -> pa.Array:
        return pa.ListArray.from_arrays(np.arange(0, len(values) + 1, length, dtype=np.int32), values)

    def answers(ids: list[str]) -> list[pa.Array]:
        n = len(ids)
        (prompt, prompt_ids), (text, token_ids) = texts(n, 40), texts(n * pairs, tokens)
        message = pa.StructArray.from_arrays([pa.array(["user"] * n), prompt], ["role", "content"])
        finish = pa.array(["stop"] * (n * pairs))
        response = pa.StructArray.from_arrays([text, token_ids, finish], ["text", "token_ids", "finish_reason"])
        thoughts = pa.nulls(n, pa.list_(pa.string()))
        tokenizer = pa.array(["tokenizer"] * n)
        return [pa.array(ids), lists(message, 1), lists(response, pairs), prompt_ids, tokenizer, thoughts]

    def rankings(ids: list[str]) -> list[pa.Array]:
        logits = rng.normal(size=(len(ids), pairs, pairs)).astype(np.float32) * 2
        logits[:, range(pairs), range(pairs)] = 0
        scores = (logits - logits.swapaxes(1, 2)).mean(-1)
        matrices = lists(lists(pa.array(logits.reshape(-1)), pairs), pairs)
        return [pa.array(ids), matrices, lists(pa.array(scores.reshape(-1)), pairs)]

    (directory / "ranking").mkdir(parents=True)
    order = rng.permutation(prompts) if shuffle else np.arange(prompts)
    files = [(directory / "responses.parquet", responses_schema(), np.arange(prompts), answers)]
    for shard, part in enumerate(np.array_split(order, 8)):
        files.append((directory / f"ranking/shard-{shard:05d}.parquet", ranking_schema(), part, rankings))
    for path, schema, numbers, columns in files:
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for start in range(0, len(numbers), ROWS):
                ids = [f"{n:016x}" for n in numbers[start : start + ROWS].tolist()]
                writer.write_table(pa.Table.from_arrays(columns(ids), schema=schema))


def measure(command: list[str]) -> tuple[float, float]:
    """(seconds, peak MiB) of a command's process. Raises CalledProcessError with what it said if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise subprocess.CalledProcessError(process.returncode, command, log.read())
    return seconds, usage.ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 100_000], help="sizes (10000 100000)")
    parser.add_argument("--pairs", type=int, default=5, help="K (5)")
    parser.add_argument("--tokens", type=int, default=60, help="mean length of a response (60)")
    parser.add_argument("--test_size", default="0", help="compute_prob.py's hold-out (0)")
    parser.add_argument("--shuffle", action="store_true", help="rankings in another order than the responses")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.prompts[0], args.pairs, args.tokens, args.shuffle)
        return 0
    print(f"{'prompts':>9} {'seconds':>9} {'prompts/s':>10} {'peak, MiB':>10}", flush=True)
    for prompts in args.prompts:
        with tempfile.TemporaryDirectory(prefix="sppo-pairing-") as scratch:
            data = Path(scratch) / "data"
            common = [f"--pairs={args.pairs}"]
            maker = [
                sys.executable,
                __file__,
                f"--make={data}",
                f"--prompts={prompts}",
                f"--tokens={args.tokens}",
                *common,
            ]
            measure([*maker, *(["--shuffle"] if args.shuffle else [])])
            script = [sys.executable, str(ROOT / "scripts" / "compute_prob.py"), f"--output_dir={data}"]
            try:
                seconds, peak = measure([*script, *common, f"--test_size={args.test_size}"])
            except subprocess.CalledProcessError as error:
                print(error.output, file=sys.stderr)
                return 1
            print(f"{prompts:>9} {seconds:>9.1f} {prompts / seconds:>10.0f} {peak:>10.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

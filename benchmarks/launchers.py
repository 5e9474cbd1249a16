"""What the launchers themselves cost: for so many shards that do nothing, on three machines that are really this one.

    python benchmarks/launchers.py --shards 8 64 512

Reads   nothing; starts a Slurm of three nodes (slurm-wlm and munge, as root) and a Ray of three, and stops them.
Writes  a Markdown table to the terminal: seconds from the command to its first shard's process; for the shards' work;
        from the last shard's end to the launcher's end, which is when the next stage starts; a shard's share of all.
Exit codes: 0 done, 1 failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cluster  # noqa: E402

from sppo.command.errors import run_main  # noqa: E402
from sppo.command.progress import columns  # noqa: E402

# a shard that does nothing but say when: the manifest is what a launcher waits for
SHARD = """
import sys, time
numbers = sys.argv[sys.argv.index("--data_frac") + 1].split(",")
open(f"{sys.argv[1]}/began-{numbers[0]}", "w").write(repr(time.time()))
for number in numbers:
    open(f"{sys.argv[1]}/shard-{int(number):05d}.parquet", "w").close()
    with open(f"{sys.argv[1]}/shard-{int(number):05d}.manifest.json", "w") as out:
        out.write('{"inputs": {}, "settings": {}, "outputs": {}, "counts": {}}')
"""


def measure(words: list[str], count: int, env: dict[str, str]) -> list[str]:
    """[processes, seconds until the first, of the shards, after the last, a shard]."""
    with tempfile.TemporaryDirectory() as scratch:
        shards = Path(scratch) / "shards"
        shards.mkdir()
        launch = [sys.executable, str(ROOT / "tests/shards.py"), *words, f"--shards={count}", f"--shards_dir={shards}"]
        launch += [f"--logs={scratch}/logs", "--stage=b", "--", sys.executable, "-S", "-c", SHARD, str(shards)]
        began = time.time()
        subprocess.run(launch, cwd=ROOT, env=env, check=True, capture_output=True)
        ended = time.time()
        starts = sorted(float(path.read_text()) for path in shards.glob("began-*"))
        last = max(path.stat().st_mtime for path in shards.glob("*.manifest.json"))
    spent = (starts[0] - began, last - starts[0], ended - last, (ended - began) / count)
    return [str(len(starts)), *(f"{seconds:.2f}" for seconds in spent)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[8, 64, 512])
    args = parser.parse_args()
    rows = [["launcher", "shards", "processes", "s before the first", "s of all", "s after the last", "s a shard"]]
    with ExitStack() as stack:
        plain = {**os.environ, "PYTHONPATH": str(ROOT)}
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = {"local": (["--gpus=none,none,none"], plain)}
        if reason := cluster.why_no_slurm():
            print(f"slurm: {reason}")
        else:
            slurm = stack.enter_context(cluster.slurm(scratch / "slurm", 3))
            inside = stack.enter_context(slurm.allocation(3))
            places["slurm"] = (["--launcher=slurm", "--gpus=none"], {**inside, "PYTHONPATH": str(ROOT)})
        ray = stack.enter_context(cluster.ray(3))
        places["ray"] = (["--launcher=ray", "--gpus=none", f"--ray_address={ray.address}"], plain)
        for name, (words, env) in places.items():
            for count in args.shards:
                rows.append([name, str(count), *measure(words, count, env)])
                print("\t".join(rows[-1]), flush=True)
    print("\n".join(["", f"{os.cpu_count()} cores", *columns(rows)]))
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    run_main(main)

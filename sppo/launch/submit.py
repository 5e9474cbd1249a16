"""A run as one Slurm job, submitted by a driver outside an allocation: recipes/launch.slurm with the run's flags."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from sppo.command import stopping
from sppo.command.errors import SPPOError, UsageError
from sppo.command.search_path import ROOT
from sppo.recipe import Recipe

SCRIPT = ROOT / "recipes" / "launch.slurm"


def sbatch_command(recipe: Recipe, argv: list[str]) -> list[str]:
    """The sbatch command of a run with the drivers' flags `argv`; --sbatch's flags win over ours."""
    log = Path(recipe.run_dir).absolute() / "logs" / "%x-%j.log"
    words = ["sbatch", "--parsable", f"--job-name={recipe.name}", f"--nodes={recipe.nodes or 1}", f"--output={log}"]
    words += [f"--gpus-per-node={recipe.gpus_per_node}"] if recipe.gpus_per_node else []
    try:
        theirs = shlex.split(recipe.sbatch)
    except ValueError as error:
        raise UsageError(f"--sbatch {recipe.sbatch}: not flags as a shell takes them ({error})") from None
    asked = [word for word in argv if word != "--dry_run"]
    return [*words, *theirs, str(SCRIPT), "bash", str(ROOT / "scripts" / "run.sh"), *asked]


def submit(recipe: Recipe, argv: list[str], dry_run: bool) -> None:
    """Submit the run of `recipe`, with the flags `argv`; a dry run prints the script.

    Raises SPPOError where Slurm does not take it.
    """
    command, run_dir = sbatch_command(recipe, argv), Path(recipe.run_dir)
    stop = str(run_dir.absolute() / "stop")
    if dry_run:
        print(f"{SCRIPT.read_text(encoding='utf-8')}\n# {stopping.VARIABLE}={shlex.quote(stop)} {shlex.join(command)}")
        return
    if not shutil.which("sbatch"):
        raise SPPOError("--launcher slurm: there is no sbatch here; start this where jobs are submitted")
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)  # Slurm does not make the log's directory
    environment = {**os.environ, stopping.VARIABLE: stop}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SPPOError(f"sbatch does not take the job: {' '.join(done.stderr.split())}. Change --sbatch or --nodes")
    job = done.stdout.strip().partition(";")[0]
    print(f"submitted: job {job}; its log: {run_dir / 'logs' / f'{recipe.name}-{job}.log'}")
    print(f"squeue -j {job} shows it; scancel {job} ends it; the same command goes on from there")

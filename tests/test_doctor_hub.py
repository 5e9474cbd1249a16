"""The preflight and the Hub: who may push, and a model that is looked at without its weights."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import hub_server
import pytest
import tiny
from test_doctor import flags_of

from sppo.preflight.findings import size

ASK_THE_HUB = """
import sys
from sppo import cli, iterations
from sppo.plan import driver_parser
from sppo.preflight import verdict as doctor
from sppo.command.errors import SPPOError
from sppo.preflight.hub import check_hub
_, recipe = cli.parse(driver_parser(""), sys.argv[1:])
try:
    for finding in check_hub(doctor.open_run(iterations.opened(recipe))):
        print(finding.level, finding.text)
except SPPOError as error:
    print("no", error)
"""


@pytest.mark.parametrize(
    ("role", "org", "env", "said"),
    [
        ("write", "me", {}, "ok me may push to me"),
        ("write", "team", {}, "ok me may push to team"),
        ("write", "readers", {}, "no me may only read in --org readers"),
        ("write", "others", {}, "no me does not belong to --org others; its own: me, team, readers"),
        ("read", "team", {}, "no the token of me may only read"),
        ("fineGrained", "team", {}, "note the token is fine-grained"),
        (
            "write",
            "me",
            {"HF_TOKEN": "hf_wrong"},
            "no --org me: the Hub refuses (401): ",
        ),
        ("write", "me", {"HF_TOKEN": ""}, "no --org me: there is no token; set HF_TOKEN or run `hf auth login`"),
        ("write", "me", {"HF_HUB_OFFLINE": "1"}, "no --org me: HF_HUB_OFFLINE is set; unset it"),
        ("write", "me", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "no --org me: the Hub is out of reach"),
    ],
)
def test_who_may_push(models: Path, tmp_path: Path, role: str, org: str, env: dict[str, str], said: str) -> None:
    with hub_server.running() as hub:
        hub.user, hub.role, hub.orgs = "me", role, {"team": "write", "readers": "read"}
        flags = flags_of(models, tmp_path, "--org", org)
        shown = tiny.succeed(sys.executable, "-c", ASK_THE_HUB, *flags, **{**hub.env, **env})
    assert said in shown
    assert hub_server.TOKEN not in shown
    assert "hf_wrong" not in shown


def test_a_model_on_the_hub_is_looked_at_without_its_weights(models: Path, tmp_path: Path) -> None:
    home = {"HF_HOME": str(tmp_path / "hf")}
    shutil.copytree(models / "llama3", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    shutil.copy(weights, weights.with_name("consolidated.safetensors"))  # the same in another form, which is not read
    with hub_server.running() as hub:
        hub.models = {"me/chat": {"1" * 40: tmp_path / "model"}}
        command = ["scripts/doctor.py", *flags_of(models, tmp_path, "--model=me/chat")]
        shown = tiny.succeed(*command, **hub.env, **home)
    assert f"{size(2 * weights.stat().st_size)} to download" in shown
    assert "0.136 million parameters" in shown  # the file's size over float32's: its header counts as 0.001
    assert "an answer ends with <|eot_id|>" in shown
    assert not [r for r in hub.requests if r.startswith("GET") and r.endswith(".safetensors")]
    # what is in the cache now is not taken for the model: offline, its weights would never come
    code = "from sppo.models.policy import open_policy; open_policy('me/chat')"
    done = tiny.run(sys.executable, "-c", code, **home)
    assert "me/chat: not a directory here, and the Hub does not give it" in done.stderr

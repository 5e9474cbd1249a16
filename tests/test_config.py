"""Recipes and flags: a typo never passes, and the command line wins."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import tiny

from sppo import cli, iterations, recipe
from sppo.training.settings import accumulation

RECIPES = sorted((tiny.ROOT / "recipes" / "sppo").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipes_load(path: Path) -> None:
    assert recipe.load_recipe(path).pairs == {"smollm2": 8, "smollm2-few": 8}.get(path.stem, 5)


@pytest.mark.parametrize(("name", "epochs"), [("paper-llama-3", 6), ("paper-gemma-2", 1)])
def test_the_papers_recipes_differ_in_the_schedule_alone(name: str, epochs: int) -> None:
    """Whoever mends paper.yaml has to mend the other models' too."""
    paper, other = (recipe.load_recipe(tiny.ROOT / f"recipes/sppo/{stem}.yaml") for stem in ("paper", name))
    assert other == dataclasses.replace(paper, schedule_epochs=epochs)
    assert paper.schedule_epochs == 18


@pytest.mark.parametrize(
    ("driver", "steps"), [("mistral", 1), ("llama-3", 1), ("gemma-2", 2), ("gemma-2-27b", 8)], ids=lambda value: value
)
def test_the_drivers_of_the_released_runs_have_its_batches(driver: str, steps: int) -> None:
    """64 pairs a step on 8 GPUs: 8 x 8, 8 x 4 x 2 and 8 x 1 x 8; and alpaca-eval's configuration is there for each."""
    words = shlex.split((tiny.ROOT / f"run_sppo_{driver}.sh").read_text().splitlines()[-1])
    flags = dict(zip(words[3:-1:2], words[4:-1:2], strict=True))
    named = flags.pop("--name")
    made = recipe.load_recipe(None, {flag.removeprefix("--"): value for flag, value in flags.items()})
    assert accumulation(made, 8) == steps
    assert 8 * made.batch_size * steps == 64
    assert (tiny.ROOT / "models_configs" / f"{named}-iter3" / "configs.yaml").is_file()


def test_released_yaml_says_what_the_defaults_are() -> None:
    assert recipe.load_recipe() == recipe.Recipe()


def test_the_recipe_of_an_older_run_still_loads(tmp_path: Path) -> None:
    """Its recipe.yaml names every setting of that time, at its default."""
    (tmp_path / "recipe.yaml").write_text("pairs: 3\nfused_attention: false\n")
    assert recipe.load_recipe(tmp_path / "recipe.yaml") == recipe.Recipe(pairs=3)
    assert recipe.Recipe(pairs=3).reg == "none"  # which that time did not know


def test_every_iteration_is_held_to_the_runs_first_model() -> None:
    """Not to the model that it starts from: that one moves on."""
    run = recipe.Recipe(model="me/first", model_revision="v1", run_dir="runs/x", reg="reverse", reg_coef=0.1)
    for number in (1, 2, 3):
        mine = iterations.iteration(run, number)
        assert (mine.anchor_model, mine.anchor_revision) == ("me/first", "v1")
    own = iterations.iteration(dataclasses.replace(run, anchor_model="me/other"), 2)
    assert (own.anchor_model, own.anchor_revision) == ("me/other", "")
    assert not iterations.iteration(recipe.Recipe(model="me/first", run_dir="runs/x"), 2).anchor_model


def test_a_flag_wins_over_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("pairs: 3\nbeta: 0.01\nmodel: a=b\n")
    parser = cli.make_parser("", ["pairs", "beta", "model", "split_prompts"])
    _, recipe = cli.parse(parser, ["--recipe", str(tmp_path / "r.yaml"), "--beta=1e-4", "--split_prompts"])
    assert (recipe.pairs, recipe.beta, recipe.model, recipe.split_prompts) == (3, 1e-4, "a=b", True)
    _, recipe = cli.parse(parser, ["--model=x=y=z"])  # the released scripts cut at the second =
    assert recipe.model == "x=y=z"


SCRIPTS = sorted(
    p for p in (tiny.ROOT / "scripts").iterdir() if p.name not in ("env.sh", "begin.sh", "install.sh", "__pycache__")
)
SCRIPTS += [tiny.ROOT / "sppo" / "run_sppo.py", *tiny.ROOT.glob("run_sppo_[lmg]*.sh")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_every_script_has_help_and_refuses_typos(script: Path) -> None:
    shown = tiny.succeed(script, "--help")
    assert "--" in shown
    assert len(shown) > 300
    done = tiny.run(script, "--modle", "x")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr

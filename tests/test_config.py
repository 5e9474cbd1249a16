"""Recipes and flags: a typo never passes, and the command line wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from sppo import cli, recipe

RECIPES = sorted((tiny.ROOT / "recipes" / "sppo").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_recipes_load(path: Path) -> None:
    assert recipe.load_recipe(path).pairs == {"smollm2": 8}.get(path.stem, 5)


def test_released_yaml_says_what_the_defaults_are() -> None:
    assert recipe.load_recipe() == recipe.Recipe()


def test_the_recipe_of_an_older_run_still_loads(tmp_path: Path) -> None:
    """Its recipe.yaml names every setting of that time, at its default."""
    (tmp_path / "recipe.yaml").write_text("pairs: 3\nfused_attention: false\n")
    assert recipe.load_recipe(tmp_path / "recipe.yaml") == recipe.Recipe(pairs=3)


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

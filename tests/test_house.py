"""The house: a stage's code is in its folder and stands on nothing of another stage; the lock and the ranges agree."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from sppo import recipe, schema
from sppo.preflight import machine
from sppo.training.settings import IDENTITY, USUAL, known_names

SPPO = tiny.ROOT / "sppo"
STAGES = {"generation", "ranking", "pairing", "training", "evaluation", "hub"}
# what every stage stands on
SHARED = {"command", "store", "models", "method", "rankers", "schema", "recipe", "cli"}
# what each of these stands on
BELOW: dict[str, set[str]] = {"schema": set(), "command": set(), "method": set(), "recipe": {"command"}}
BELOW["cli"] = BELOW["recipe"] | {"recipe"}
BELOW["store"] = {"command", "schema"}
BELOW["models"] = BELOW["store"] | {"store", "recipe"}
BELOW["launch"] = BELOW["cli"] | {"cli", "store", "schema", "training"}  # it asks whether a training is done
BELOW["rankers"] = BELOW["models"] | {"models", "method"}


def name_of(path: Path) -> str:
    parts = ("sppo", *path.relative_to(SPPO).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SPPO.rglob("*.py")}


def imports(path: Path, inside_functions: bool) -> set[str]:
    """Our modules that a module imports; those of type checkers alone do not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "sppo":
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                found.update(name if name in MODULES else child.module for name in names)
            elif isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names if alias.name in MODULES)
            elif isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
                continue
            elif inside_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_a_stage_imports_no_other_stage() -> None:
    for name, path in MODULES.items():
        folder = name.split(".")[1] if "." in name else ""
        reached = {module.split(".")[1] for module in imports(path, inside_functions=True) if "." in module}
        if folder in STAGES:
            assert reached <= SHARED | {folder}, f"{name} imports {sorted(reached - SHARED - {folder})}"
        elif folder in BELOW:
            assert reached <= BELOW[folder] | {folder}, f"{name} imports {sorted(reached - BELOW[folder])}"


def test_no_module_imports_itself_through_others() -> None:
    """No circle among the imports that run when a module is loaded."""
    edges = {name: imports(path, inside_functions=False) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> None:
        assert name not in way, " -> ".join([*way, name])
        if name not in done:
            for other in edges[name]:
                walk(other, [*way, name])
            done.add(name)

    for name in edges:
        walk(name, [])


def test_every_name_that_is_imported_exists() -> None:
    """Imports inside functions too: compute_prob.py --org once imported a name that was not there."""
    folders = ("sppo", "scripts", "benchmarks", "tests")
    for path in [p for folder in folders for p in (tiny.ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sppo":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    found = hasattr(module, alias.name) or f"{node.module}.{alias.name}" in MODULES
                    assert found, f"{path}: {node.module} has no {alias.name}"


def test_every_column_has_a_meaning() -> None:
    schemas = {
        "responses": schema.responses_schema(),
        "ranking": schema.ranking_schema(),
        "train": schema.training_schema(),
    }
    for file, columns in schemas.items():
        assert set(columns.names) <= set(schema.MEANING), file
        assert set(schema.REQUIRED[file]) <= set(columns.names)
    assert {name for columns in schemas.values() for name in columns.names} == set(schema.MEANING)


def test_every_setting_is_read_by_a_script() -> None:
    """A key that no script reads would be a setting that changes nothing."""
    by_the_loop = {"iterations", "split_prompts", "evaluate", "gpus_per_node", "sbatch"}
    read = {key for keys in recipe.KEYS.values() for key in keys}
    assert read | by_the_loop == set(recipe.Recipe.__dataclass_fields__)
    assert set(IDENTITY) <= set(recipe.KEYS["train"])


def test_the_names_that_are_taken_for_known_are_known_to_transformers() -> None:
    for flag, usual in USUAL.items():
        assert set(usual) <= set(known_names(flag))


def test_the_lock_lies_within_the_ranges() -> None:
    pins = machine.tested()
    for wanted in machine.requirements():
        if wanted.name != "vllm":
            found = pins[wanted.name.replace("_", "-").lower()]
            assert wanted.specifier.contains(found), f"{wanted}, and requirements.lock has {found}"
    assert "://" not in (tiny.ROOT / "requirements.lock").read_text()


def bare_python(tmp_path: Path) -> Path:
    """A Python without any package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    return tmp_path / "bare" / "bin" / "python"


def test_a_python_without_the_packages_gives_way_to_the_venv(tmp_path: Path) -> None:
    if Path(sys.prefix).resolve() != (tiny.ROOT / ".venv").resolve():
        pytest.skip("the tests do not run in the project's .venv")
    done = tiny.run(bare_python(tmp_path), "scripts/compute_prob.py", "--output_dir", tmp_path)
    assert done.returncode == 1
    assert "lacks the package" in done.stderr
    assert f"going on with {tiny.ROOT / '.venv/bin/python'}" in done.stderr
    assert "draw the responses first" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_python_that_has_torch_keeps_its_versions(tmp_path: Path) -> None:
    """A conda user's, say: it lacks one package, and .venv's versions of all the others are not meant."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    done = tiny.run(
        bare_python(tmp_path), "scripts/compute_prob.py", "--output_dir", tmp_path, PYTHONPATH=str(tmp_path)
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: .*/bare/bin/python lacks the package \w+. `.*/bare/bin/python -m pip install -e .*` installs .*\n",
        done.stderr,
    )


@pytest.mark.parametrize("script", ["compute_prob.py", "plan.py", "rank.py"])
def test_a_python_without_the_packages_and_no_venv_is_one_line(tmp_path: Path, script: str) -> None:
    copy = tmp_path / "copy"
    for folder in ("sppo", "scripts", "recipes"):
        shutil.copytree(tiny.ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    flags = {"plan.py": ["--skip_preflight"]}.get(script, ["--output_dir", str(tmp_path)])
    done = subprocess.run(
        [bare_python(tmp_path), copy / "scripts" / script, *flags], capture_output=True, text=True, cwd=copy
    )
    assert done.returncode == 1
    assert re.search(
        r"^error: .* lacks the package \w+\. Run `bash .*/scripts/install\.sh`, and start this with ", done.stderr
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("uv", [True, False])
def test_without_a_fitting_python_uv_brings_one(tmp_path: Path, uv: bool) -> None:
    """On a machine whose PATH has no Python; uv's download is the internet's part, so a script stands for it."""
    (tmp_path / "bin").mkdir()
    for name in "bash cat cksum cut dirname grep tail uname touch".split():
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    if uv:
        (tmp_path / "bin" / "uv").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/asked\nexit 3\n')
        (tmp_path / "bin" / "uv").chmod(0o755)
    for name in ("setup.py", "requirements.lock", "scripts/install.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tiny.ROOT / name, tmp_path / name)
    done = subprocess.run(
        ["bash", tmp_path / "scripts" / "install.sh"],
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
    )
    if uv:
        assert "making .venv with the one that uv brings" in done.stdout
        assert (done.returncode, (tmp_path / "asked").read_text().split()[0]) == (3, "venv")
    else:
        assert done.returncode == 1
        assert "no Python 3.11 to 3.14 with venv found" in done.stderr
        assert "or install uv" in done.stderr


@pytest.mark.parametrize(
    "setting",
    ["extra-index-url='https://a/simple https://b/simple'", "constraint='/a.txt /b.txt'", "client-cert='/own.pem'"],
)
def test_uv_installs_from_where_pip_would_or_pip_does(tmp_path: Path, setting: str) -> None:
    """Who has packages from an index of their own must not get them from elsewhere. Scripts stand for pip and uv."""
    bin = tmp_path / ".venv" / "bin"
    bin.mkdir(parents=True)
    answer = f'case "$*" in *"config list") echo "global.{setting}" ;; *) echo "$@" >> {tmp_path}/pip ;; esac'
    (bin / "python").write_text(f"#!/bin/bash\n{answer}\n")
    (bin / "uv").write_text(f'#!/bin/bash\necho "$UV_INDEX: $@" >> {tmp_path}/uv\n')
    for name in ("python", "uv"):
        (bin / name).chmod(0o755)
    for name in ("setup.py", "requirements.lock", "scripts/install.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tiny.ROOT / name, tmp_path / name)
    done = subprocess.run(["bash", tmp_path / "scripts" / "install.sh", "vllm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by = "pip" if "client" in setting else "uv"
    lines = [line for line in (tmp_path / by).read_text().splitlines() if "requirements.lock" in line]
    assert len(lines) == 1
    assert "-e .[vllm" in lines[0]
    if "index" in setting:
        assert lines[0].startswith("https://a/simple https://b/simple: pip install")
    elif "constraint" in setting:
        assert "--constraint /a.txt --constraint /b.txt --constraint requirements.lock" in lines[0]
    else:
        assert not (tmp_path / "uv").exists()


def test_a_command_starts_without_what_it_does_not_use(tmp_path: Path) -> None:
    """And afterwards a user's ranker can import it all the same, and garbage is collected."""
    (tmp_path / "mine.py").write_text(
        "import gc, sys\n"
        "from sppo.command.importing import import_networks\n"
        "import_networks('transformers.trainer')\n"
        "print(sorted({'sklearn', 'scipy', 'datasets', 'torch', 'transformers.modeling_utils'} & set(sys.modules)))\n"
        "import datasets, scipy.optimize, sklearn.metrics\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(gc.isenabled(), sklearn.metrics.roc_auc_score([0, 1], [0.2, 0.7]))\n"
    )
    done = tiny.run(tmp_path / "mine.py", PYTHONPATH=str(tiny.ROOT))
    assert done.stdout.splitlines() == ["['torch', 'transformers.modeling_utils']", "True 1.0"], done.stderr
    # a command that has used transformers before, for a tokenizer, say: it then counts on both
    (tmp_path / "late.py").write_text(
        "from transformers.utils import is_scipy_available, is_sklearn_available\n"
        "print(is_scipy_available(), is_sklearn_available())\n"
        "from sppo.command.importing import import_networks\n"
        "import_networks()\n"
        "from transformers.models.deberta_v2 import modeling_deberta_v2\n"
    )
    assert tiny.succeed(tmp_path / "late.py", PYTHONPATH=str(tiny.ROOT)).splitlines()[0] == "True True"

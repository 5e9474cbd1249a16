"""The documents: what they name is there, every page is in the index, and the aids have one set of versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import yaml

PAGES = [tiny.ROOT / "README.md", tiny.ROOT / "CONTRIBUTING.md", tiny.ROOT / "CHANGELOG.md"]
PAGES += sorted((tiny.ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"")
NAMED = re.compile(r"\b((?:scripts|sppo|recipes|benchmarks|examples|docs)/[\w/.-]*\w\.(?:py|sh|yaml|slurm|md))\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for pair in LINK.findall(text) for link in pair if link and "://" not in link]
    named = [] if page.name == "CHANGELOG.md" else NAMED.findall(text)  # it names what is gone
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in named if not (tiny.ROOT / name).exists()]
    assert not missing


def test_every_page_has_an_entry_in_the_index() -> None:
    index = (tiny.ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (tiny.ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == {name for name in pages if f"]({name})" in index}


def test_pre_commit_has_the_versions_of_the_tests() -> None:
    hooks = yaml.safe_load((tiny.ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    setup = (tiny.ROOT / "setup.py").read_text()
    for pin in {pin for hook in hooks for pin in hook["additional_dependencies"]}:
        assert f'"{pin}"' in setup

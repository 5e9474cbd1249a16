"""Tiny models, made once for all tests. No test needs a GPU or the network."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny  # noqa: E402


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with llama3, mistral, gemma2 and qwen3 models and the golden PairRM (with its base beside it)."""
    root = tmp_path_factory.mktemp("models")
    tiny.llama3(root / "llama3")
    tiny.mistral(root / "mistral")
    tiny.gemma2(root / "gemma2")
    tiny.qwen3(root / "qwen3")
    shutil.copytree(tiny.GOLDEN / "pairrm" / "PairRM", root / "PairRM")
    shutil.copytree(tiny.GOLDEN / "pairrm" / "tiny-deberta", root / "tiny-deberta")
    return root

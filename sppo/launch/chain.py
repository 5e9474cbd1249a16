"""The flags of generate.sh and pipeline.sh: read once, checked, and shared out to the commands of the chain.

    python -m sppo.launch.chain generate --model M --prompt P --out_path DIR ...
    python -m sppo.launch.chain pipeline --model M --dataset D --output_dir DIR ...

Prints bash that sets one array of words for each command; the script evaluates it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from sppo import cli
from sppo.cli import flags
from sppo.command.errors import UsageError, run_main
from sppo.launch.resources import Place, add_place_flags
from sppo.recipe import KEYS, require_pairs

Words = dict[str, list[str]]  # by the array's name

GENERATE = """One iteration's data, over every GPU given: responses, rankings, training set.

    bash scripts/generate.sh --model M --prompt PROMPTS --out_path runs/x/iter1/data

Reads   the model, the prompts, the ranker.
Writes  <out_path>/responses.parquet, ranking/, train.parquet, test.parquet, each with its manifest; logs beside it.
        With --org, as the last step, the data sets on the Hub.
Exit codes: 0 done (also: nothing left to do), 2 wrong use, 130 interrupted, else that of the stage that failed.
"""
PIPELINE = """One iteration's training: $DATA -> $MODEL, over every GPU given.

    bash scripts/pipeline.sh --model M --iter 1 --dataset runs/x/iter1/data --output_dir runs/x/iter1/model --num 1

Reads   the policy and the data set (a $DATA directory, a train.parquet, or a Hub id).
Writes  <output_dir>, which appears when the model is whole; logs beside it. With --push_model, then, the model on the
        Hub.
Exit codes: 0 done (also: nothing left to do), 1 failed (also: the model is whole but could not be pushed; it says what
to run), 2 wrong use, 130 interrupted.
"""


def _parser(doc: str, script: str, keys: list[str]) -> argparse.ArgumentParser:
    parser = cli.make_parser(doc, dict.fromkeys(keys))
    parser.prog = f"bash scripts/{script}"
    add_place_flags(parser)
    parser.add_argument("--logs", type=Path, help="where logs go (default: logs beside what is written)")
    parser.add_argument("--name", default="", help="name on the Hub; one that ends in -iter2 gives the tag iter2")
    parser.add_argument("--overwrite", action="store_true", help="make it again although other settings made it")
    return parser


def generate_parser() -> argparse.ArgumentParser:
    stages = ("generate", "combine_generate", "preload", "rank", "compute_prob", "push_to_hub")
    parser = _parser(GENERATE, "generate.sh", [key for stage in stages for key in KEYS[stage]])
    parser.add_argument("--prompt", dest="prompts", help="the same as --prompts")
    parser.add_argument("--out_path", type=Path, required=True, help="the iteration's data directory")
    parser.add_argument("--frac", type=int, default=0, help="prompts in a shard (default: shared evenly)")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th prompt from the I-th on")
    return parser


def generate(args: argparse.Namespace, given: dict[str, Any]) -> Words:
    """The words of generate.sh's commands. `given`: the settings among the flags."""
    if given.get("org") and not args.name:
        raise UsageError("--org needs --name, the data sets' name on the Hub")
    if _is_on(given, "public") and not given.get("org"):
        raise UsageError("--public needs --org, where to push to")
    cli.parse_part(args.part)
    data = flags(output_dir=args.out_path) + ["--overwrite"] * args.overwrite
    place, logs = Place.of(args), flags(logs=args.logs or args.out_path.parent / "logs")

    def words(stage: str) -> list[str]:
        return [*_settings(args, given, stage), *data]

    own = flags(frac_len=args.frac, prompts_part=args.part, world_size=args.world_size)
    shards, ranking = args.out_path / "responses", args.out_path / "ranking"
    push = [*_settings(args, given, "push_to_hub"), *flags(output_dir=args.out_path, name=args.name)]
    return {
        "generate_shards": [*place.flags(), *logs, *flags(name="generate", shards_dir=shards)],
        "generate": [*words("generate"), *own],
        "combine_generate": words("combine_generate"),
        "preload": words("preload"),
        "rank_shards": [*place.flags(world_size=False), *logs, *flags(name="rank", shards_dir=ranking)],
        "rank": words("rank"),
        "compute_prob": words("compute_prob"),
        "push_to_hub": push if given.get("org") else [],
    }


def pipeline_parser() -> argparse.ArgumentParser:
    parser = _parser(PIPELINE, "pipeline.sh", [*KEYS["train"], *KEYS["push_to_hub"], "push_model"])
    parser.add_argument("--dataset", required=True, help="data directory, train.parquet or Hub id")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the trained model appears")
    parser.add_argument("--iter", type=int, default=0, help="the iteration's number, for the model card")
    parser.add_argument("--num", dest="num_train_epochs", help="epochs: the same as --num_train_epochs")
    parser.add_argument(
        "--accelerate_config",
        default="",
        help="a YAML, or a name in recipes/accelerate_configs (default: cpu, one_gpu or zero3); without GPUs it also "
        "says how many processes there are",
    )
    return parser


def pipeline(args: argparse.Namespace, given: dict[str, Any]) -> Words:
    """The words of pipeline.sh's commands."""
    push = _is_on(given, "push_model")
    if not push and (given.get("org") or args.name or _is_on(given, "public")):
        raise UsageError("--org, --name and --public are for --push_model")
    if push and not (given.get("org") and args.name):
        raise UsageError("--push_model needs --org and --name, where to push to")
    own = flags(dataset=args.dataset, output_dir=args.output_dir, iter=args.iter)
    launch = [*Place.of(args).flags(), *flags(logs=args.logs or args.output_dir.parent / "logs")]
    where = flags(model_dir=args.output_dir, name=args.name)
    return {
        "train_launch": [*launch, *flags(accelerate_config=args.accelerate_config)],
        "train": [*_settings(args, given, "train"), *own, *["--overwrite"] * args.overwrite],
        "push_to_hub": [*_settings(args, given, "push_to_hub"), *where] if push else [],
    }


def _is_on(given: dict[str, Any], switch: str) -> bool:
    return given.get(switch, "false").lower() == "true"


def _settings(args: argparse.Namespace, given: dict[str, Any], stage: str) -> list[str]:
    """The recipe, and of the settings among the flags those that the stage reads."""
    recipe = flags(recipe=args.recipe) if args.recipe else []
    return recipe + flags(**{key: given[key] for key in KEYS[stage] if key in given})


def main() -> None:
    what, argv = sys.argv[1], sys.argv[2:]
    parser, share = {"generate": (generate_parser(), generate), "pipeline": (pipeline_parser(), pipeline)}[what]
    if {"--help", "-h"} & set(argv):
        _tell_bash(f"printf %s {shlex.quote(parser.format_help())}; exit 0")
        return
    args, recipe = cli.parse(parser, argv)  # also: a wrong value ends here
    if what == "generate":
        require_pairs(recipe)
    words = share(args, cli.given(parser, args))
    _tell_bash("\n".join(f"{name}=({shlex.join(array)})" for name, array in words.items()))


def _tell_bash(text: str) -> None:
    """Write to stdout what the script evaluates: to the letter, where print() would show a control character's name."""
    sys.stdout.buffer.write(text.encode() + b"\n")


if __name__ == "__main__":
    run_main(main)

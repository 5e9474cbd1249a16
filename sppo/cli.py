"""A recipe from the command line: every setting is a flag of every script, under its own name.

So generate.sh and pipeline.sh hand their flags on as they came. A script checks a setting that it does not read, its
name, type and limits, and leaves it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from sppo.command.errors import CHILD, UsageError
from sppo.command.values import expanded, refuse_secret_flags
from sppo.recipe import _FIELDS, _TYPES, Recipe, load_recipe, nearest

# the released names of some settings
_RELEASED = {
    "prompts": "--prompt",
    "prompts_part": "--part",
    "data_dir": "--out_path",
    "iteration": "--iter",
    "num_train_epochs": "--num",
}


class Parser(argparse.ArgumentParser):
    """argparse whose error names the nearest known flag. `keys`: the recipe's keys that are flags here."""

    keys: tuple[str, ...] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        refuse_secret_flags(sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            setattr(found, name, expanded(name, value))
        return found, unknown

    def error(self, message: str) -> typing.NoReturn:
        unknown = re.match("unrecognized arguments: (.*)", message)
        absent = re.match("the following arguments are required: (.*)", message)
        bare = re.match("argument ([^:]*): expected one argument", message)
        if unknown:
            flag = unknown[1].split()[0].split("=")[0]
            known = [o for a in self._actions for o in a.option_strings]
            is_flag = flag.startswith("-")
            message = f"unknown flag {flag}{nearest(flag, known)}" if is_flag else f"{flag} is not a flag"
        elif absent:
            message = f"{absent[1]} {'are' if ',' in absent[1] else 'is'} missing"
        elif bare:
            message = f"{bare[1]} needs a value"
        raise UsageError(f"{message}\nSee {self.prog} --help.")


def make_parser(doc: str | None, keys: Iterable[str] = (), output_dir: str = "") -> Parser:
    """A parser with --recipe and one flag for each of the recipe's `keys`; its help opens with `doc`.

    output_dir: the key that --output_dir means.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--recipe", metavar="FILE", help="YAML with every setting (default: recipes/sppo/released.yaml)"
    )
    _add_settings(parser, "settings (a flag wins over the recipe; shown: released.yaml's value)", keys, output_dir)
    return parser


def chain_parser(doc: str | None, reads: Iterable[str], output_dir: str = "data_dir") -> Parser:
    """The parser of a script of the chain: it takes what generate.sh and pipeline.sh take, and shows first what it
    `reads`.
    """
    parser = make_parser(doc, reads, output_dir)
    _add_settings(
        parser, "settings that other scripts read; here they are checked, and left alone",
        [key for key in _FIELDS if key not in parser.keys], output_dir,
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="make it again although other settings made it")
    parser.add_argument("--logs", type=Path, help="where logs go (default: logs beside what is written)")
    parser.add_argument(
        "--frac_len", "--frac", type=int, default=0, metavar="N", help="rows in a shard; 0: shared evenly by the shards"
    )
    return parser


def add_shard_flags(parser: argparse.ArgumentParser) -> None:
    """Which shards a sharded stage works on."""
    parser.add_argument(
        "--data_frac",
        default="0",
        help="which shard: rows [data_frac*frac_len, (data_frac+1)*frac_len); or 0,1,2",
    )
    parser.add_argument("--numgpu", type=int, default=1, help="how many shards there are")


def _add_settings(parser: Parser, title: str, keys: Iterable[str], output_dir: str) -> None:
    group = parser.add_argument_group(title)
    added = tuple(keys)
    parser.keys += added
    for key in added:
        kind, meta, default = _TYPES[key], _FIELDS[key].metadata, getattr(Recipe, key, {})
        names = [f"--{key}"]
        if key in _RELEASED:
            names.append(_RELEASED[key])
        if key == output_dir:
            names.append("--output_dir")

        if typing.get_origin(kind) is Literal:
            metavar = "|".join(typing.get_args(kind))
        else:
            metavar = "true|false" if kind is bool else kind.__name__.upper()
        options: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
        shown = f" ({default})" if default != "" else ""
        text = f"{meta['help']}{shown}".replace("%", "%%")
        group.add_argument(*names, dest=key, metavar=metavar, help=text, **options)


def parse(parser: Parser, argv: list[str] | None = None) -> tuple[argparse.Namespace, Recipe]:
    """Parse `argv`: the script's own flags, and the recipe with the flags that override it."""
    args = parser.parse_args(argv)
    return args, load_recipe(args.recipe or getattr(args, "recipe_file", None), given(parser, args))


def given(parser: Parser, args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's keys among the flags, as they were written."""
    return {name: getattr(args, name) for name in parser.keys if getattr(args, name, None) is not None}


def prompts_by_hand(parser: Parser, args: argparse.Namespace) -> str | None:
    """--prompts of a script that reads responses, which by hand means: fail unless they answer these prompts, as they
    are now. In generate.sh, generate.py has just read them.
    """
    return None if CHILD in os.environ else given(parser, args).get("prompts")


def data_dir_of(recipe: Recipe) -> Path:
    """$DATA, which a script of generate.sh cannot do without. Raises UsageError where it is not named."""
    return require_dir("--output_dir (--out_path)", recipe.data_dir)


def require_dir(flag: str, value: str) -> Path:
    """A directory that a script cannot do without. Raises UsageError where it is not named."""
    if not value:
        raise UsageError(f"{flag} is missing: name it, or a --recipe that an iteration of a run has written")
    return Path(value)


def flags(**values: object) -> list[str]:
    """["--key=value", ...] for a command of this project; a dictionary as the JSON that such a flag takes."""
    shown = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in values.items()}
    return [f"--{key}={value}" for key, value in shown.items()]

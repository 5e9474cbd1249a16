"""A benchmark suite for a model: AlpacaEval 2, MT-Bench, or the Open LLM Leaderboard's tasks.

    bash scripts/evaluate.sh --model runs/x/iter3/model --suite mt_bench --judge_url http://host:8000/v1 --judge_model J
    bash scripts/evaluate.sh --suite open_llm --fetch

Reads   the model; the suite's questions, from the Hub or --questions; the judge's server (alpaca_eval, mt_bench), with
        OPENAI_API_KEY where it wants a key. Of a run's model, <run>/iter<i>/recipe.yaml says how answers are drawn.
Writes  <output_dir>/suites/<suite>/figures.json with its manifest, the answers and judgements; of a run's model the
        figures also go into <run>/summary.json, and into report.html when it is made next.
Stopped, the same command goes on: answers and judgements that are there are kept. It needs `pip install '.[eval]'`.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import UsageError, run_main
from sppo.command.values import require_plain_address
from sppo.recipe import KEYS, load_recipe

SUITES = ("alpaca_eval", "mt_bench", "open_llm")
OPENAI = "https://api.openai.com/v1"
# settings that are the suite's own, so that a flag would change nothing
FIXED = {
    "alpaca_eval": [],
    "mt_bench": ["temperature", "top_p"],
    "open_llm": "temperature top_p maxlen prompt_seeds system_prompt chat_template_kwargs".split(),
}


def main() -> None:
    parser = cli.make_parser(__doc__, KEYS["evaluate"])
    parser.add_argument("--suite", required=True, choices=SUITES, metavar="|".join(SUITES))
    parser.add_argument("--judge_url", default="", help=f"the judge's OpenAI-compatible server ({OPENAI})")
    parser.add_argument("--judge_model", default="", help="the judge's name there (default: the suite's published one)")
    parser.add_argument("--questions", default="", help="your own: alpaca_eval: instruction, output; mt_bench: "
                        "question_id, category, turns, reference; open_llm: a task's .yaml")  # fmt: skip
    parser.add_argument("--leaderboard", type=int, choices=(1, 2), default=1, help="open_llm: the first or the second")
    parser.add_argument("--mixture", nargs="+", default=[], metavar="M", help="more models: one of all, drawn by "
                        "--seed, answers each question")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, help="where suites/ goes (default: beside the model of a run)")
    parser.add_argument("--fetch", action="store_true", help="only fetch the questions, for a machine without network")
    parser.add_argument(
        "--overwrite", action="store_true", help="answer and judge again although it was done otherwise"
    )
    args = parser.parse_args()
    require_plain_address("--judge_url", args.judge_url)
    asked = cli.given(parser, args)
    if no_use := [key for key in FIXED[args.suite] if key in asked]:
        raise UsageError(f"--{no_use[0]} is not read by --suite {args.suite}, which has its own")
    if args.suite == "mt_bench":
        asked.setdefault("maxlen", 1024)  # as published, whatever the run's recipe says
    written = Path(asked.get("model", ""), "..", "recipe.yaml").resolve()
    recipe = load_recipe(
        args.recipe or (str(written) if asked.get("model") and written.exists() else None), {**asked, "pairs": 1}
    )
    if args.suite == "open_llm" and (args.judge_url or args.judge_model):
        raise UsageError("open_llm has no judge; --judge_url and --judge_model are for alpaca_eval and mt_bench")
    if args.suite == "open_llm" and args.mixture:
        raise UsageError("--mixture is not for open_llm: a mixture's accuracy is the mean of its models' accuracies")
    if len({recipe.model, *args.mixture}) <= len(args.mixture):
        raise UsageError("--mixture names a model twice")
    if args.suite != "open_llm" and args.leaderboard != 1:
        raise UsageError("--leaderboard is for --suite open_llm")
    if args.suite == "open_llm" and (args.launcher != "local" or args.shards):
        raise UsageError("--launcher and --shards are not read by --suite open_llm, which answers in one process")
    if args.suite == "open_llm":  # it answers in this process, on the first GPUs; the others start one for each
        from sppo.launch.devices import devices, groups, refuse_absent

        names = devices(args.gpus)
        refuse_absent(names)
        # -1 for the CPU: of an empty value vLLM thinks that a GPU will come
        os.environ["CUDA_VISIBLE_DEVICES"] = groups(names, args.world_size)[0] or "-1"
    from sppo.evaluation.suites.evaluate import evaluate, fetch

    args.judge_url = args.judge_url or OPENAI
    fetch(recipe, args) if args.fetch else evaluate(recipe, args)


if __name__ == "__main__":
    run_main(main)

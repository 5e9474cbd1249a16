"""alpaca-eval's model configurations, made from checkpoints; the server applies their own chat templates.

    python scripts/make_models_configs.py --run_dir runs/x
    python scripts/make_models_configs.py --model runs/x/iter3/model --name x-iter3

Reads   the models of all iterations of a run, or one model. Sampling: --recipe or flags.
Writes  <output_dir>/<name>/configs.yaml, one a model, for `alpaca_eval evaluate_from_model --model_configs ...`.
Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import UsageError, run_main
from sppo.command.values import require_plain_address
from sppo.recipe import load_recipe


def main() -> None:
    keys = ("maxlen", "temperature", "top_p", "system_prompt", "chat_template_kwargs")
    parser = cli.make_parser(__doc__, keys)
    parser.add_argument("--run_dir", type=Path, help="a run: one configuration for each of its iterations")
    parser.add_argument("--model", default="", help="one model, as the configuration shall name it")
    parser.add_argument("--name", default="", help="with --model: the name in the leaderboard")
    parser.add_argument("--url", default="", help="where the model is served (http://localhost:8000/v1)")
    parser.add_argument("--output_dir", type=Path, default=Path("models_configs"), help="%(default)s")
    args = parser.parse_args()
    require_plain_address("--url", args.url)
    recipe = load_recipe(args.recipe, {**cli.given(parser, args), "pairs": 1})
    if bool(args.run_dir) == bool(args.model) or bool(args.model) != bool(args.name):
        raise UsageError("pass --run_dir, or --model and --name")
    from sppo.evaluation.match import iteration_models
    from sppo.evaluation.suites.models_configs import URL, write

    wanted = [(args.model, args.name)]
    if args.run_dir:
        name = args.run_dir.resolve().name
        wanted = [(str(model), f"{name}-iter{i}") for i, model in iteration_models(args.run_dir).items()]
    for model, name in wanted:
        print(f"make_models_configs: {write(model, name, recipe, args.url or URL, args.output_dir)}")


if __name__ == "__main__":
    run_main(main)

"""The mean of several models' weights as a model, such as that of a run's iterations.

    python scripts/average.py --run_dir runs/x --base mistralai/Mistral-7B-Instruct-v0.2 --output_dir runs/x/average
    python scripts/average.py --models runs/x/iter2/model runs/x/iter3/model --output_dir runs/x/average

Reads   the models: all of a run's iterations, with --base the first model too, or those named.
Writes  <output_dir>, a model like the others; it appears when it is whole.
SPPO's theory is about the average policy: a mixture that answers each prompt with one of the iterations' models. The
mean of their weights is one model, and only approximates that mixture.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import UsageError, run_main


def main() -> None:
    parser: argparse.ArgumentParser = cli.make_parser(__doc__)
    parser.add_argument("--run_dir", type=Path, help="a run: the models of all its iterations")
    parser.add_argument("--base", default="", help="with --run_dir: the first model too")
    parser.add_argument("--models", nargs="+", default=[], metavar="M", help="the models, directories or Hub ids")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the mean is written")
    parser.add_argument("--overwrite", action="store_true", help="make it again although other models made it")
    args = parser.parse_args()
    if bool(args.run_dir) == bool(args.models) or (args.base and not args.run_dir):
        raise UsageError("pass --run_dir, with or without --base, or --models")
    models = args.models
    if args.run_dir:
        from sppo.evaluation.match import iteration_models

        models = [str(model) for model in iteration_models(args.run_dir).values()]
        if args.base:
            models = [args.base, *models]
    if len(models) < 2:
        raise UsageError(f"{', '.join(models)}: the mean of one model is that model")
    from sppo.training.average import average

    average(models, args.output_dir, args.overwrite)


if __name__ == "__main__":
    run_main(main)

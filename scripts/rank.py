"""Compare every ordered pair of each prompt's K responses with the preference model.

    python scripts/rank.py --output_dir runs/x/iter1/data --ranker llm-blender/PairRM --ranker_prompt text

Reads   <output_dir>/responses.parquet; the ranker; for --ranker_prompt templated the --model whose template it is.
Writes  <output_dir>/ranking/shard-<data_frac>.parquet (prompt_id, logits K x K, scores K) and its manifest; while it
        works, a journal beside them, from which a killed run goes on.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import config
from sppo.errors import run_main

KEYS = "model model_revision pairs ranker ranker_revision ranker_prompt batch_tokens chat_template_kwargs".split()


def main() -> None:
    parser = config.make_parser(__doc__, KEYS)
    config.add_shard_flags(parser)
    parser.add_argument("--gpu", help="the GPU to use, as CUDA_VISIBLE_DEVICES names it (default: as it is set)")
    config.add_prompts_check(parser)
    args, recipe = config.parse(parser)
    if args.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.gpu
    from sppo.generation import Slice, check_prompts
    from sppo.ranking import rank_shard

    check_prompts(args.output_dir, args.prompts)
    shard = Slice(args.frac_len, args.data_frac, args.numgpu)
    rank_shard(recipe, args.output_dir, shard, args.data_frac, args.overwrite)


if __name__ == "__main__":
    run_main(main)

"""Compare every ordered pair of each prompt's K responses with the preference model.

    python scripts/rank.py --output_dir runs/x/iter1/data --ranker llm-blender/PairRM --ranker_prompt text
    python scripts/rank.py --output_dir D --ranker Skywork/Skywork-Reward-V2-Qwen3-8B --ranker_backend reward-model
    python scripts/rank.py --output_dir D --ranker Qwen/Qwen3-32B --ranker_backend judge --ranker_url http://host:8000/v1
    python scripts/rank.py --output_dir D --ranker my_module:my_function

Reads   <output_dir>/responses.parquet; the ranker, at the revision that preload.py left in <output_dir>/ranker.json;
        for a PairRM with --ranker_prompt templated the --model whose template it is (default: the model that drew the
        responses); for a judge OPENAI_API_KEY.
Writes  <output_dir>/ranking/shard-<data_frac>.parquet (prompt_id, logits K x K, scores K) and its manifest; while it
        works, a journal beside them, from which a killed run goes on.
Exit codes: 0 done (also: nothing left to do), 1 failed, 2 wrong use, 130 interrupted.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sppo import cli
from sppo.command.errors import run_main
from sppo.recipe import KEYS, require_pairs


def main() -> None:
    parser = cli.chain_parser(__doc__, KEYS["rank"])
    cli.add_shard_flags(parser)
    parser.add_argument("--gpu", help="the GPU to use, as CUDA_VISIBLE_DEVICES names it (default: as it is set)")
    args, recipe = cli.parse(parser)
    data_dir = cli.data_dir_of(recipe)
    require_pairs(recipe)
    if args.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.gpu
    from sppo.generation.combine import refuse_other_prompts
    from sppo.ranking.shards import rank_shards
    from sppo.store.shards import Slice, parse_shards

    refuse_other_prompts(data_dir, cli.prompts_by_hand(parser, args))
    parts = [Slice(args.frac_len, number, args.numgpu) for number in parse_shards(args.data_frac)]
    rank_shards(recipe, data_dir, parts, args.overwrite)


if __name__ == "__main__":
    run_main(main)

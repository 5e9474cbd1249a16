"""Stage 1, generation: draw K responses for every prompt from the policy.

Reads a policy and prompts.
Does what the engine of the recipe draws, one shard a process; the shards are then put together.
Writes $DATA/responses/shard-*.parquet and $DATA/responses.parquet.
"""

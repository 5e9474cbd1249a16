"""Stage 1, generation: K responses from the policy to every prompt.

The prompts are cut into shards, one for each process (shards.py). An engine draws the responses (engines/). The shards
are then put together into $DATA/responses.parquet (combine.py).
"""

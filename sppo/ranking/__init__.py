"""Stage 2, ranking: ask the preference model about every ordered pair of the K responses.

Reads $DATA/responses.parquet and a preference model of sppo/rankers.
Does each pair both ways round, identical responses once, one shard a process.
Writes $DATA/ranking/shard-*.parquet: the raw logits.
"""

"""Stage 3, pairing: from the ranker's logits to win rates, and from win rates to the training set.

$DATA/responses.parquet and $DATA/ranking/*.parquet are joined by prompt_id (join.py). Of each prompt's K responses the
best and the worst become a pair of $DATA/train.parquet or test.parquet (training_set.py).
"""

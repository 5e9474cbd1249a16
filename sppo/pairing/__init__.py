"""Stage 3, pairing: from logits to win rates, and from win rates to the training set.

Reads $DATA/responses.parquet and $DATA/ranking/*.parquet, joined by prompt_id.
Does one of two estimators of the win rates, and picks the best and the worst response.
Writes $DATA/train.parquet and $DATA/test.parquet.
"""

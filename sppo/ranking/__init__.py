"""Stage 2, ranking: the preference model's logits of every ordered pair of a prompt's K responses."""

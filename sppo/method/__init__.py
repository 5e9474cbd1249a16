"""The paper (arXiv 2405.00675): win rates from logits, the best and the worst response, the losses."""

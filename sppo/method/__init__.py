"""The paper: Self-Play Preference Optimization, arXiv 2405.00675. Three short files, to be read in this order.

1. `preference.py`: from the ranker's logits C to P(y_i > y_j), by two estimators.
2. `winrates.py`: from P to each response's win rate against the policy, P(y_i > pi_t), and to the best and the worst.
3. `loss.py`: from win rates to the loss that moves the policy from pi_t to pi_{t+1}.

One iteration: for each prompt x, the policy pi_t draws K responses y_1 ... y_K, and the ranker compares all pairs of
them. The step that the paper takes is that of multiplicative weights, where eta = 1 / beta is its size:

    pi_{t+1}(y|x) is proportional to pi_t(y|x) exp(eta P(y > pi_t | x))

Taking the logarithm, with Z(x) for what makes the probabilities sum to 1:

    log pi_{t+1}(y|x) - log pi_t(y|x) = eta P(y > pi_t | x) - log Z(x)

The paper replaces log Z(x) by eta / 2. The loss is the squared difference of the two sides.
"""

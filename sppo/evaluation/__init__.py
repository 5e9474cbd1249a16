"""Evaluation: how a run's models compare on held-out prompts, and on benchmark suites.

answers     draws a model's answers, as scripts/generate.py does
match       compares two models' answers by the ranker or by the second judge
report      an iteration against the first model, with the measures and health of its answers: summary.json
matrix      all models of a run against each other: matrix.json
page/       report.html
best        the best of n responses to each prompt
suites/     AlpacaEval 2, MT-Bench, IFEval, IFBench, the Open LLM Leaderboard's tasks
"""

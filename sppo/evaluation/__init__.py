"""Evaluation: how a run's models compare on held-out prompts, and on benchmark suites.

answers     draws a model's answers, as scripts/generate.py does
match       compares two models' answers by the ranker or by the second judge
report      an iteration against the first model, with the measures and health of its answers: summary.json
step        an iteration against the one before it, by the ranker and by the second judge: step.json
guard       what follows from the steps: after which iteration a run ends, and the best model: guard.json
matrix      all models of a run against each other: matrix.json
page/       report.html
best        the best of n responses to each prompt
suites/     AlpacaEval 2, MT-Bench, IFEval, IFBench, the Open LLM Leaderboard's tasks
"""

"""Benchmark suites of others, a file each: AlpacaEval 2, MT-Bench, the Open LLM Leaderboard's tasks.

Reads a model, a suite's questions (its own, from the Hub, or a file), and for the first two a judge's server.
Does the answering with our own engines (Open LLM: lm-eval's), and lets the suite's own rules make the figures.
Writes <output_dir>/suites/<suite>/: figures.json with its manifest, answers, judgements.
"""

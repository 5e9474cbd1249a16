"""Benchmark suites of others, a file each: AlpacaEval 2, MT-Bench, IFEval, IFBench, the Open LLM Leaderboard's tasks.

Answers are drawn by our own engines (Open LLM: by lm-eval's), and each suite's own rules make the figures. They land in
<output_dir>/suites/<suite>/: figures.json with its manifest, answers, judgements.
"""

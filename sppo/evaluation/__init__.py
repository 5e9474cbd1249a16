"""Evaluation: who wins on held-out prompts, the base model or an iteration's.

Reads a run's models and held-out prompts.
Does the drawing (as scripts/generate.py) and asks the ranker, and a second judge, who wins.
Writes iter<i>/eval/ and summary.json.
"""

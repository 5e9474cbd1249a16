"""The world of run_sppo_smollm2.sh: a real chat model, and a preference that needs no download.

Reads nothing of a run. `model` makes SmolLM2's directory; `instructions` makes the prompts, and is the preference
(`--ranker examples.smollm2.instructions:preference`) and the measure
(`--measure examples.smollm2.instructions:measures`).
"""

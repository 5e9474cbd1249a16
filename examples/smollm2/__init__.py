"""The world of run_sppo_smollm2.sh: a real chat model, and a preference that is a program.

model           SmolLM2-135M-Instruct as a plain model directory.
instructions    The prompts, the ranker (`--ranker examples.smollm2.instructions:preference`), and the measure for the
                report (`--measure examples.smollm2.instructions:measures`).
"""

"""SPPO: Self-Play Preference Optimization (arXiv 2405.00675), one module a stage.

generation -> ranking -> pairing -> trainer, chained by loop; see README.md.
"""

import os

__version__ = "0.1.0"

os.environ.setdefault("DO_NOT_TRACK", "1")  # vLLM and huggingface_hub would report what they are used for

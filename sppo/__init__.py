"""SPPO: Self-Play Preference Optimization (arXiv 2405.00675), one module a stage.

generation -> ranking -> pairing -> trainer, chained by loop; see README.md.
"""

__version__ = "0.1.0"

"""Stage 4, training: regress the policy's log-ratios on the win rates.

Reads a policy (it is the reference too) and train.parquet.
Does the optimiser steps, under DDP or DeepSpeed where there are several processes.
Writes $MODEL, the next iteration's policy.
"""

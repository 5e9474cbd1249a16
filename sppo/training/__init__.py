"""Stage 4, training: from a policy and train.parquet to the next iteration's policy in $MODEL.

train.py puts everything together. rows.py, data.py and batches.py go from the file to batches; logps.py and
reference.py give the log-probs; trainer.py makes the optimiser steps, under DDP or DeepSpeed with several processes;
checkpoints.py and save.py write to the disk.
"""

"""Processes: the stages' commands on the devices of this machine.

Reads the flags of generate.sh and pipeline.sh (chain), and which devices there are (devices).
Does one process a GPU for shards, or one training over all (local); watches and stops them (processes).
Writes logs.
"""

"""Processes: the stages' commands on the devices of this machine, or of a cluster's.

Reads the flags of generate.sh and pipeline.sh (chain), and what devices and machines there are (devices, nodes).
Does shards, or one training over all devices, by a launcher (local, slurm, ray); watches and stops them (watch).
Writes logs.
"""

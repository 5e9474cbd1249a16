"""Models on the disk and in memory: the policy, its files, its chat template, its network."""

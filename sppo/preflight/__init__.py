"""The preflight: everything that can be known before GPU time is spent, looked at by one file a stage."""

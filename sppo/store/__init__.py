"""What stages leave on the disk: manifests, journals, Parquet files, shards, work directories, locks."""

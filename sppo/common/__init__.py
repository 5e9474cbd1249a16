"""What all stages stand on: files, journals, manifests, errors, and where models are and how they load."""

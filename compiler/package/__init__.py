"""Linking, weights and manifests: from object code to a `.kdg` file."""

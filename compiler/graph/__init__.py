"""The graph IR: operators over typed tensors."""

"""The digits model and its held-out images."""

"""Rewrites of the graph IR."""

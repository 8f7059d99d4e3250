"""Putting agents on boards over SSH."""

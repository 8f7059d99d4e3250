"""Schedules: traced, checked rewrites of loop nests."""

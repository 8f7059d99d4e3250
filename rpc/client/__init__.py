"""Clients of the tracker and of runners: numpy in, numpy out."""

"""Targets: what code is generated for, tags of known boards, and the host's own description."""

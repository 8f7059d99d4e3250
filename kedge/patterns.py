"""Patterns of operators, for `kedge.External`. All of it lives in `kedge.compiler.graph.patterns`."""

from __future__ import annotations

from kedge.compiler.graph.patterns import *  # noqa: F403 - the same names, as they come and go
from kedge.compiler.graph.patterns import __all__ as __all__

"""Tensor expressions: what an operator computes, element by element. All of it lives in `kedge.compiler.te`."""

from __future__ import annotations

from kedge.compiler.te import *  # noqa: F403 - the same names, as they come and go
from kedge.compiler.te import __all__ as __all__

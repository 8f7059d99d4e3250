"""Networks as modules, written in Python. All of it lives in `kedge.compiler.frontend.nn`."""

from __future__ import annotations

from kedge.compiler.frontend.nn import *  # noqa: F403 - the same names, as they come and go
from kedge.compiler.frontend.nn import __all__ as __all__

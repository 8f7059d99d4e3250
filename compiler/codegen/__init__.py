"""Machine code from scheduled functions; the only place that knows llvmlite."""

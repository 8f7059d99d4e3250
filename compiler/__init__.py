"""The compiler: from a model to an artifact. `pipeline.py` is its table of contents."""

"""The operators, one file per family: inference, numpy reference, lowering and fusion kind side by side."""

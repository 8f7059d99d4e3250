"""Schedule rules: match, the space of decisions, and how to apply them."""

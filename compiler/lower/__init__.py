"""From fused groups of operators to loops, and from loops to a planned program."""

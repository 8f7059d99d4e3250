"""Schedule primitives: pure functions from a valid function to a valid function of the same meaning.

Loops are named by their variables, blocks by their names. A primitive that does not apply raises `ScheduleError`.
"""

"""The main job, end to end: tracker, agents, a trained model, a table."""

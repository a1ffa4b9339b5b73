"""What a run does beside learning: checkpoints, logs, export, its result file."""

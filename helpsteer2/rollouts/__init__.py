"""Rollouts: prompts → samples → scores → log-probabilities → advantages, as groups on disk."""

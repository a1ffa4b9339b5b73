"""Scoring and training of SteerLM 2.0 beside plain transformers on padded sequences."""

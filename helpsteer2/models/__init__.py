"""Backbones, packed attention and the reward model."""

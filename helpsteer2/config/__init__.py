"""Composing a configuration and checking it against the signatures it names."""

"""Prompts in, sampled responses out: engines behind one interface."""

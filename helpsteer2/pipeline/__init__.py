"""Ordered stages, each a command of ours in a process of its own: skip what is done, go on."""

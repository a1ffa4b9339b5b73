"""A small made-up world whose ratings are known exactly, for runs without any download.

A fixed table says what is true of everybody; prompts ask for some of it; answers vary in truth,
completeness, order, wording and length; an oracle rates any text, and simulated annotators rate as
people do.
"""

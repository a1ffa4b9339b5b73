"""A small made-up world whose ratings are known exactly, for runs without any download."""

"""How good a reward model is: held-out ratings and preference benchmarks."""

"""On-policy training where every response can be listed, against optima that are known."""

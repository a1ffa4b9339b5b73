"""SteerLM 2.0 where every response can be listed, against posteriors that are known."""

"""Multi-attribute reward models on HelpSteer2: train, evaluate, export."""

__version__ = "0.1.0"

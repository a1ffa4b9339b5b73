"""An on-policy iteration beside TRL's RLOOTrainer and PPOTrainer."""

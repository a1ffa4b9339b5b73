"""Speed of one reward-model training step, against TRL's RewardTrainer."""

"""A DPO step of a policy beside TRL's DPOTrainer."""

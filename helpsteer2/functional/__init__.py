"""Pure maths on tensors and arrays; imports nothing of the project."""

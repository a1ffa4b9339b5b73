"""From text to attribute scores and one reward."""

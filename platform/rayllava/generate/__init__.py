"""How a checkpoint answers."""

"""Training recipes: functions that return a Recipe, one file a line of models."""

"""Folder layouts of checkpoints: one file a project."""

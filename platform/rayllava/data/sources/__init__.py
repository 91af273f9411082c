"""Where annotations come from: one file a format."""

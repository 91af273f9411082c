"""Strangers' bytes and addresses: what may be read, and how much of it."""

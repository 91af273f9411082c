"""Benchmarks: ask and score, each alone."""

"""Spec to module: build, tune, quantize, forward and loss."""

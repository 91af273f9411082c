"""Read, write, prove: between any two layouts."""

"""The quickstart's own: pictures, warm-up and report."""

"""Comparison: methods x seeds at equal budget and at equal KL."""

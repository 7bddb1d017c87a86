"""Evaluation: held-out prompts, drift limits, statistics, the probe, benchmark tasks."""

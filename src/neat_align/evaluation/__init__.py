"""Evaluation: held-out prompts before and after, drift limits, statistics, the probe, benchmark
tasks.
"""

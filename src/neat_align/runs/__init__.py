"""Runs: what is kept in a run directory, exact resume, complete checkpoints, the lock, signals,
ranks acting together.
"""

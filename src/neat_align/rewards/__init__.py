"""Rewards: what scores completions.

Higher is better; `None` abstains; a failure is an error and never a zero.
"""

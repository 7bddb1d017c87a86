"""Rounds: completions and groups, their order, making a round, unfinished work on disk, metrics,
exports. No torch.
"""

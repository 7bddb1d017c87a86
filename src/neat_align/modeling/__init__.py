"""Models: loading, number types, groups packed into rows, shared-prefix attention, per-token
log-probabilities.
"""

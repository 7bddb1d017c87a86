"""Comparison: methods x seeds at equal budget and at equal KL.

spec.py         what a comparison is made of; methods.yaml holds the shipped methods
before_runs.py  what can be checked before the first run
runner.py       makes every run that is not there yet
outcomes.py     what a run of a comparison left: points, collapse
equal_kl.py     the methods' values at one KL
summary.py      from the evaluations to the table, with intervals
result_file.py  comparison.json and examples.json
"""

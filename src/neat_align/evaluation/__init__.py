"""Evaluation: is the model better, at which price, and is it still itself?

held_out.py         a policy on held-out prompts: rewards, judges, KL, perplexity, variety
before_after.py     two evaluations of the same prompts, compared
statistics.py       intervals, rates and effect sizes; no torch
drift_limits.py     KL and variety against the start; max_kl and its like, which stop a run
drift_monitor.py    the same around every round, against the start on the disk
probe.py            how strongly an instruction pair moves the reward, before training
probe_params.py     what a probe is asked for, and who does its work
probe_decoding.py   what decoding from the contrast of a bank's pairs reaches
probe_summary.py    what a probe's answers say of each pair: gap, verdict, leaks
benchmark_tasks.py  tasks of the lm-evaluation-harness before and after
"""

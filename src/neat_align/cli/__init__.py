"""The command line: `neat-align VERB`. Heavy imports happen inside commands, so that `--help`
answers at once.

    app.py            the verbs, how they end (exit codes), what an error looks like
    console.py        what every verb does with the terminal
    processes.py      several processes of one launch: each message once, a clean end
    options.py        recipes (YAML) and arguments to typed settings; reports a wrong key or value
    tables.py         a run's and a comparison's results as tables
    progress.py       bars and lines while a run works; terminal_callbacks

    demo.py           a small real model aligned in minutes
    train.py          a run from a recipe and options
    dry_run.py        what it would do and take of the memory, without weights
    expand.py         the data stage alone
    expand_stream.py  the data stage over data that does not fit in memory, round by round
    expand_ray.py     the data stage on Ray: its options, the cluster, what a worker is made of
    evaluate.py       held-out evaluation alone
    compare.py        methods x seeds
    compare_file.py   a comparison's YAML, what it begins as (like), the arguments over it
    probe.py          how strongly a bank's instruction pairs move a reward
    probe_options.py  what a probe is asked for, and the checks of it
    probe_run.py      a probe from options to numbers
    probe_table.py    a probe's numbers, and what to do with them
    capability.py     benchmark tasks before and after
    inspect.py        groups in the terminal
    report.py         a run's page again
    recipes/          the shipped recipes (*.yaml) and comparisons (compare-*.yaml)
"""

from __future__ import annotations

from neat_align.cli.app import PAUSED, app, main

__all__ = ["PAUSED", "app", "main"]

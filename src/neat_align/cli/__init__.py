"""The command line: `neat-align VERB`. Heavy imports happen inside commands, so that `--help`
answers at once.

    app.py            the verbs, how they end (exit codes), what an error looks like
    console.py        what every verb does with the terminal
    processes.py      several processes of one launch: each message once, a clean end
    options.py        recipes (YAML) and arguments to typed settings; reports a wrong key or value
    option_names.py   one name for one thing in every verb, and its other spellings
    option_groups.py  the groups in which the help shows a run's options
    option_facts.py   what help and completion say of an option, without transformers
    verb.py           a verb: its help, its completion, its lists
    help_page.py      how a page of help looks
    pages.py          examples and notes of each verb's page
    completion.py     what a shell completes
    tables.py         a run's and a comparison's results as tables
    progress.py       what a terminal shows of a run; terminal_callbacks
    display.py        what it does now, how fast, and what is left: live, or in plain lines
    run_state.py      the same as data, and how it reads
    summary_lines.py  a line for what was measured

    demo.py           a small real model aligned in minutes
    doctor.py         what a run will find on this machine
    doctor_checks.py  versions, devices, threads, disk, hub, extras, vLLM: what is looked at
    init.py           a commented recipe for a model and its data: what is asked, tried and said
    init_look.py      what a look at model and data finds
    init_recipe.py    the recipe's options, and why they are what they are
    train.py          a run from a recipe and options
    dry_run.py        what it would do and take of the memory, without weights
    expand.py         the data stage alone
    expand_stream.py  the data stage over data that does not fit in memory, round by round
    expand_ray.py     the data stage on Ray: its options, the cluster, what a worker is made of
    export.py         what a run or an expansion wrote, as data of other trainers
    export_source.py  where an export's groups come from
    export_push.py    an exported data set on the hub, when it is asked for
    evaluate.py       held-out evaluation alone
    compare.py        methods x seeds
    compare_file.py   a comparison's YAML, what it begins as (like), the arguments over it
    probe.py          how strongly a bank's instruction pairs move a reward
    probe_options.py  what a probe is asked for, and the checks of it
    probe_run.py      a probe from options to numbers
    probe_table.py    a probe's numbers, and what to do with them
    capability.py     benchmark tasks before and after
    merge.py          a run's adapter merged into its base, as a model of its own
    push.py           a finished model to the hub
    inspect.py        groups in the terminal
    report.py         a run's page again
    recipes/          the shipped recipes (*.yaml) and comparisons (compare-*.yaml)
"""

from __future__ import annotations

from neat_align.cli.app import PAUSED, app, main

__all__ = ["PAUSED", "app", "main"]

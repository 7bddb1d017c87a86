"""Reporting: pages and terminal views of what a run or a comparison left on the disk.

No model is loaded here.

    pages.py                numbers in words, and pages in which nothing runs but our own script
    charts.py               the report's charts, as Vega-Lite specifications
    comparison_charts.py    the comparison's charts: the frontier, and gains with intervals
    svg.py                  a specification drawn as SVG: dark mode, titles, no random names
    run_files.py            what a run directory holds
    round_rewards.py        a round's rewards, from one pass over its groups
    run_groups.py           what the groups of a run say
    run_tables.py           before and after, each of several rewards, the contrast that is left
    run_warnings.py         what should make the reader of a report pause
    run_report.py           report.html
    model_card.py           README.md of a model: the card that the hub shows
    card_facts.py           what a card knows of the model, its base and its data
    card_texts.py           what every card says; names and text made fit for one
    comparison_files.py     what comparison.json and examples.json hold
    comparison_tables.py    a comparison's tables
    comparison_warnings.py  what should make the reader of a comparison pause
    comparison_report.py    comparison.html
    data_card.py            README.md of an exported data set
    trainer_configs.py      what a trainer is told so that it reads one
    tracker_tables.py       groups as the rows of a tracker's table
    terminal.py             groups in the terminal
    group_counts.py         a round's groups in numbers, for the terminal
"""

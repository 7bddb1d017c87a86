"""Runs: what is kept in a run directory, and how a run survives.

run_directory.py      opening, resuming and saving, as the one process that writes sees it
plan.py               how much a run will do, with what share of the data
record.py             run.json: what was run, on what, with which versions
run_key.py            run-key.json: what a run may not change when it goes on
checkpoints.py        checkpoints that are complete or absent
resume_state.py       what exact resume needs and Trainer's checkpoints leave out
trainer_internals.py  every private name of Trainer that is used
lock.py               one writer a run directory
launch.py             what a launcher tells its processes; whether a start is its own restart
leftovers.py          what a run leaves that ended before its first finished work
ranks.py              the processes of a run acting together
shared_calls.py       calls that all of them make a share of
signals.py            SIGINT and SIGTERM as a request to stop
events.py             what a run tells whoever watches it
"""

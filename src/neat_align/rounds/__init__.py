"""Rounds: from prompts to ranked groups of completions, on disk and without torch.

In the order in which a round is made:

    params.py          what a round is made of (counts, margin) and who does the work
    prompt_order.py    which prompts a round takes: an endless stream of seeded shuffles
    sampling_stage.py  which completions are drawn, under which instruction, with which seed
    kept_samples.py    what a sampler has drawn so far of a call, on the disk
    branching.py       where a plain answer branches under the two instructions
    human_answers.py   the data's own answers as completions
    filters.py         blank answers, repeats and leaked instructions out
    scoring_stage.py   rewards, log-probabilities under the plain prompt, contrasts of tokens
    scoring_notes.py   what could not be scored, and what reward functions logged
    ranking.py         what ranks a group's completions, and which pairs that gives
    make_round.py      the stages above, one after the other: one round
    rollout_store.py   finished batches of an unfinished round (work/)
    round_files.py     a finished round (groups.parquet, manifest.json)
    shards.py          slices of a round, and how they are kept where other processes make them
    shard_stages.py    what such a process does with one: the policy's stage, the rewards' stage
    ray_shards.py      the slices of a round made by workers of Ray Data
    group_file.py      its groups as a file that is written in a stream and read a few at a time

And what the rest of the package reads:

    completions.py     a completion, a group of them, and their Parquet form
    metrics.py         what a round's groups say about themselves
    text_metrics.py    variety, repetition and refusals, from text alone
    exports.py         groups as rows of other trainers: pairs, labels, best answers, ranked lists
    trainer_rows.py    such rows as TRL, OpenRLHF, axolotl and LLaMA-Factory read them
    export_file.py     a data set file of them, written in a stream, and what is counted on the way
"""

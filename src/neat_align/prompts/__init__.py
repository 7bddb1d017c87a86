"""Prompts: rows of data, the instructions that go on them, and both as token ids.

rows.py               a row: a prompt, with the data's own answers beside it
loading.py            rows of a file, a folder or a data set, checked against each other
dataset_config.py     which rows of which data set: path, split, columns, share of a mixture
data_sources.py       records of files, folders and the hub, one after the other or mixed
columns.py            columns of the data under the names that are read here
compressed.py         files that are packed (.gz, .zst, …), as bytes
file_readers.py       .jsonl, .json, .parquet, .csv, record by record
conversation_forms.py ShareGPT's, `messages` and Alpaca's rows, as prompt, chosen and rejected
row_forms.py          the forms a record can have (TRL's, HH-RLHF's transcripts), read into one
skipped_rows.py       rows that cannot be used: an error, or left out and listed
hold_out.py        rows that are kept back for evaluation: how many, and which
row_checks.py         rows against tokenizer and settings, before anything is sampled
dropped_turns.py      too long conversations, without their oldest turns
copies.py             deep copies of rows' values
instruction_banks.py  pairs of instructions, positive and negative (banks/*.yaml)
placement.py          where on a prompt an instruction goes
rendering.py          prompts and answers to token ids, by the chat template
row_prompts.py        a row's prompt as token ids, plain or under an instruction
instructed_limit.py    whether prompts under their instructions fit the model's context
template_inputs.py    tools and chat_template_kwargs: what a template is given besides messages
control_tokens.py     control tokens that a text spells out, and which of them stay text
turn_tokens.py        which tokens a template writes around turns and calls of tools
token_finder.py       any of thousands of tokens in a text
template_check.py     what tokenizer and template must do, before anything is sampled
template_reading.py   whether a template hands a row's turns, tools and answers on to the model
seeds.py              seeds and draws that depend on their arguments alone
"""

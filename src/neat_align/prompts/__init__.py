"""Prompts: rows of data, the instructions that go on them, and both as token ids.

rows.py               a row: a prompt, with the data's own answers beside it
loading.py            rows of a file, a folder or a data set, checked against each other
file_readers.py       .jsonl, .json, .parquet, .csv and `datasets`, record by record
row_forms.py          the forms a record can have (TRL's, HH-RLHF's transcripts), read into one
row_checks.py         rows against tokenizer and settings, before anything is sampled
copies.py             deep copies of rows' values
instruction_banks.py  pairs of instructions, positive and negative (banks/*.yaml)
placement.py          where on a prompt an instruction goes
rendering.py          prompts and answers to token ids, by the chat template
template_check.py     what a chat template must keep, before anything is sampled
seeds.py              seeds and draws that depend on their arguments alone
"""

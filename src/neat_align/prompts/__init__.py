"""Prompts: rows of data and their checks, instruction banks, placing an instruction, rendering to
token ids.
"""

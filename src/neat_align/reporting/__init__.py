"""Reporting: pages and terminal views of what a run or a comparison left on the disk.

No model is loaded here.
"""

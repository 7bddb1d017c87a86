"""Files that are there whole or not at all, YAML that a user wrote, and secrets kept out of what is
written.
"""

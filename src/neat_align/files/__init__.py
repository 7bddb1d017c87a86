"""Files: complete or absent, never half written, and without secrets.

atomic.py      files and folders written under a temporary name, synced, renamed
yaml.py        YAML that a user wrote, with the line of every option
paths.py       a path that is not there told from a name on the hub
secrets.py     secrets kept out of what is written and shown
provenance.py  which code, versions and machine made a number
"""

"""Speed as ratios, each measured in one run on one machine: ``python -m bench.speed`` (``make bench``).

A row (``rows.py``) is a name, what is compared, a target, and a function that gives one ratio a repeat. Another row is one line there.
"""

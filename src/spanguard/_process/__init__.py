"""All that is open in this process, and its ways out: registry, orphans, flush, exit, fork.

Imports `_record` and what is below it.
"""

"""All that is open in a process, and its ways out: orphans, flush, exit, fork, the watchdog.

The package is `spanguard._process`.
"""

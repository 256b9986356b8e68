"""One span from its request to its end: where it goes, its start, its handle, its proxy.

Imports `_process` and what is below it.
"""

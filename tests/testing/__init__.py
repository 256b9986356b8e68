"""Spans in tests: recordings, blocks that find what is left open, and the pytest plugin.

The packages are `spanguard.testing` and `spanguard.pytest_plugin`.
"""

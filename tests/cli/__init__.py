"""The command line: what it prints, and how it ends.

The package is `spanguard.cli`.
"""

"""A span elsewhere: carried and attached, in threads, tasks, processes; and generators.

The package is `spanguard._propagation`.
"""

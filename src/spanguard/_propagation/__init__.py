"""A span elsewhere: captured, carried, attached; and generators, step by step.

Imports `_lifecycle` and what is below it.
"""

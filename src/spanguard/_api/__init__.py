"""What users call: each room turns one habit into spans that open and close.

Imports `_propagation` and what is below it.
"""

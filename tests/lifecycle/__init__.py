"""One span from its request to its end: its arguments, its proxy, its id, what strict raises.

The package is `spanguard._lifecycle`.
"""

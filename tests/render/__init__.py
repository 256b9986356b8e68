"""A stored trace as a picture in the terminal.

The package is `spanguard.render`.
"""

"""What stands on nothing: settings, the user's lines, and findings, told once.

The package is `spanguard._base`.
"""

"""What users call: blocks, decorators, managers, batches, guarded clients, ids of their choice.

The package is `spanguard._api`.
"""

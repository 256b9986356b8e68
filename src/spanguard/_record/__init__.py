"""What is written on a span, so that nothing can go wrong: payloads, outcomes, exceptions.

Imports `_mlflow` and `_base`.
"""

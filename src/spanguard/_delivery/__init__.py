"""Whole traces to the store: taken over from MLflow, kept in bounds, written many at a time.

May import what is below: `_record`, `_mlflow`, `_base`.
"""

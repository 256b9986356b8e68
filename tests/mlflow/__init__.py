"""What MLflow does by itself, and what spanguard does for it: ids, seams, open traces.

The package is `spanguard._mlflow`.
"""

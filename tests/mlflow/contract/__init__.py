"""What MLflow does without spanguard: the raw problem beside each promise, and the seams we use.

Nothing here goes through spanguard. A test that fails after an upgrade of MLflow says that MLflow
changed: the promise beside it, or the seam that `spanguard._mlflow` stands on, is to be looked at.
Measured on MLflow 3.10.1 and 3.17.2, the oldest and the newest we support, on SQLite.
"""

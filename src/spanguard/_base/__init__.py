"""What stands on nothing: settings, the user's lines, findings, and values read without a risk.

Knows no MLflow and no OpenTelemetry. Imports nothing of spanguard but `exceptions`.
"""

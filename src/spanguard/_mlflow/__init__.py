"""The only room that knows MLflow and OpenTelemetry beyond their public names.

Each such name is in `seams`, with what is lost without it. Imports `_base` only.
"""

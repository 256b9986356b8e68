"""What MLflow has, seen as `_mlflow/shapes.py` says. Never run: mypy and pyright read it."""

from __future__ import annotations

from mlflow import MlflowClient
from mlflow.entities import LiveSpan, Span
from opentelemetry.trace import Span as OtelSpan

from spanguard._mlflow.shapes import Client, HasContext, HasStatus, MlflowSpan


def shapes(live: LiveSpan, stored: Span, otel: OtelSpan, client: MlflowClient) -> None:
    span: MlflowSpan = live
    with_status: HasStatus = stored
    with_context: HasContext = otel
    any_client: Client = client
    del span, with_status, with_context, any_client

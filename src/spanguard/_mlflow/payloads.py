"""What MLflow's own dump will make of a payload."""

from __future__ import annotations

import json

from spanguard._mlflow.optional import optional

__all__ = ["is_attachment", "payload_encoder"]


class _PlainEncoder(json.JSONEncoder):
    def default(self, o: object) -> str:
        return str(o)


_encoder: type[json.JSONEncoder] = (
    optional("mlflow.tracing.utils", "TraceJSONEncoder") or _PlainEncoder
)
_attachment = optional("mlflow.tracing.attachments", "Attachment")  # MLflow 3.10 has none


def payload_encoder() -> type[json.JSONEncoder]:
    """Return the encoder that MLflow serialises payloads with."""
    return _encoder


def is_attachment(value: object) -> bool:
    """Tell whether a value is an MLflow attachment, which MLflow stores in its own way."""
    return _attachment is not None and issubclass(type(value), _attachment)

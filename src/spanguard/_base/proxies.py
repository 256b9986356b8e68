"""What of wrapt's the proxies here are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import wrapt

__all__ = ["CallableProxy", "FunctionWrapper", "ObjectProxy"]


if TYPE_CHECKING:
    # Of anything at all: wrapt's classes take no parameters at run time.
    FunctionWrapper = wrapt.FunctionWrapper[Any, Any]
    CallableProxy = wrapt.CallableObjectProxy[Any]
    ObjectProxy = wrapt.BaseObjectProxy[Any]
else:
    FunctionWrapper = wrapt.FunctionWrapper
    CallableProxy = wrapt.CallableObjectProxy
    ObjectProxy = wrapt.BaseObjectProxy

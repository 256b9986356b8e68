"""What functions of ours are to pickle and cloudpickle, which treat functions in their own way."""

from __future__ import annotations

import sys

__all__ = ["asked_by_cloudpickle"]


def asked_by_cloudpickle() -> bool:
    """Tell whether the caller's caller is cloudpickle.

    Dask uses it, and joblib, Ray and Spark have copies of it in packages of their own. It takes
    whatever calls itself a function apart and ships its code, without what is wrapped around it.
    """
    module = str(sys._getframe(2).f_globals.get("__name__", ""))
    return "cloudpickle" in module

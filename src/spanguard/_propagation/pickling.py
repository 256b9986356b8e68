"""What functions of ours are to those who treat functions in their own way: pickle, engines."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["cloudpickle_asking", "ray_asking"]


class Cloudpickle:
    """One of the cloudpickles: the package, or a copy of it in joblib, Ray or Spark."""

    __slots__ = ("_names",)

    def __init__(self, names: dict[str, Any]) -> None:
        self._names = names

    def ships(self, module: str) -> bool:
        """Tell whether it ships the code of a module's functions, in place of their names."""
        registered = self._names.get("list_registry_pickle_by_value")
        parents = {module.rsplit(".", n)[0] for n in range(module.count(".") + 1)}
        return module == "__main__" or bool(registered and not parents.isdisjoint(registered()))


def cloudpickle_asking() -> Cloudpickle | None:
    """Return the cloudpickle that the caller's caller is, None for anybody else.

    Dask uses it, and joblib, Ray and Spark have copies of it in packages of their own. It takes
    whatever calls itself a function apart and ships its code, without what is wrapped around it.
    """
    names = sys._getframe(2).f_globals
    return Cloudpickle(names) if "cloudpickle" in str(names.get("__name__", "")) else None


def ray_asking() -> bool:
    """Tell whether the caller's caller is Ray, by itself or through `inspect`; not its pickle."""
    asking = sys._getframe(2)
    while asking.f_globals.get("__name__") == "inspect" and asking.f_back is not None:
        asking = asking.f_back
    module = str(asking.f_globals.get("__name__", ""))
    return module.startswith("ray.") and "cloudpickle" not in module

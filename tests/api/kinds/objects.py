"""Builtins, and objects that can be called."""

from __future__ import annotations

from collections.abc import Iterator

from tests.api.kinds.cases import cases_of
from tests.api.kinds.untraced import Adder

module = cases_of(__name__)
trace, case = module.trace, module.case


length = trace(len)
upper = trace(str.upper)
joined = trace(",".join)
biggest = trace(max)

case("builtin", lambda: length, [1], span="len", obj=[1])
case("method of a builtin type", lambda: upper, "x", span="upper", self="x")
case("bound builtin", lambda: joined, ["x", "y"], span="join", iterable=["x", "y"])
case("builtin without a signature", lambda: biggest, 1, 2, span="max", args=[1, 2])


class AsyncAdder(Adder):
    async def __call__(self, a: int) -> int:
        return a + self.b


class GeneratingAdder(Adder):
    def __call__(self, a: int) -> Iterator[int]:
        yield a + self.b


class TracedCall:
    @trace
    def __call__(self, a: int) -> int:
        return a


adder = trace(Adder(1))
async_adder = trace(AsyncAdder(1))
generating_adder = trace(GeneratingAdder(1))
traced_call = TracedCall()

case("callable object", lambda: adder, 1, span="Adder", a=1)
case("async callable object", lambda: async_adder, 1, span="AsyncAdder", a=1)
case("generating callable object", lambda: generating_adder, 1, span="GeneratingAdder", a=1)
case("__call__", lambda: traced_call, 1, span="__call__", a=1)

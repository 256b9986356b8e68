"""Callables of every kind, plain here and traced in traced_callables.py: what kinds/ has, run here.

They live in modules, so that other processes find them by name.
"""

from tests.api.kinds import sources
from tests.api.kinds.cases import cases_of

CASES, USES = cases_of(__name__).cases, cases_of(__name__).uses

for _source in sources():
    exec(_source)

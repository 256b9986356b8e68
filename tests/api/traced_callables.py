"""The callables of callables.py, traced: the same sources under another name."""

from tests.api.kinds import sources
from tests.api.kinds.cases import cases_of

CASES, USES = cases_of(__name__).cases, cases_of(__name__).uses

for _source in sources():
    exec(_source)

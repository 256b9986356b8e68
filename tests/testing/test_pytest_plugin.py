"""The pytest plugin, as pytest runs it: its fixture, strict mode, async tests, other processes."""

from __future__ import annotations

import os

import pytest

from spanguard import traced_span
from tests.store import Store
from tests.testing.plugin_runs import LEAKS, ROOT, Run

# -- strict mode -------------------------------------------------------------------------------

STRICT = """
import spanguard

def test_default():
    spanguard.TraceStateManager().pop_trace()

def test_argument():
    spanguard.TraceStateManager(strict=False).pop_trace()

def test_block():
    with spanguard.strict(False):
        spanguard.TraceStateManager().pop_trace()
"""


def test_strict_mode_is_on_unless_the_test_says_otherwise(run: Run) -> None:
    result = run("--spanguard-strict", test_strict=STRICT)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*EmptyTraceStackError*"])
    assert "SPANGUARD_STRICT" not in os.environ


def test_strict_mode_is_off_where_the_environment_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPANGUARD_STRICT", "0")
    result = run("--spanguard-strict", test_strict=STRICT, test_leaks=LEAKS)
    result.assert_outcomes(passed=6, failed=3)
    assert os.environ["SPANGUARD_STRICT"] == "0"


def test_strict_mode_is_as_it_was_without_the_option(run: Run) -> None:
    run(test_strict=STRICT).assert_outcomes(passed=3)


# -- the fixture -------------------------------------------------------------------------------


def test_the_fixture_has_what_the_test_records_and_no_more(run: Run, store: Store) -> None:
    test = """
    import mlflow
    from spanguard import traced_span

    def test_one(spans):
        with traced_span("one"), mlflow.start_span("fluent"):
            pass
        assert spans.names == ["one", "fluent"]
        assert spans.children("one") == [spans.one("fluent")]

    def test_between():
        with traced_span("stored"):
            pass

    def test_two(spans):
        assert spans == []
        with traced_span("two"):
            pass
        assert spans.names == ["two"]
        mlflow.set_tracking_uri("http://127.0.0.1:9")

    def test_three():
        assert mlflow.get_tracking_uri().startswith("sqlite:")
        with traced_span("stored, too"):
            pass
    """
    run(test_fixture=test).assert_outcomes(passed=4)
    with traced_span("outside"):
        pass
    assert set(store.spans()) == {"stored", "stored, too", "outside"}


def test_the_fixture_warns_of_what_is_left_open_and_closes_it(run: Run) -> None:
    test = """
    import mlflow

    kept = []

    def test_leaks(spans):
        kept.append(mlflow.start_span("leaked"))
        kept[-1].__enter__()

    def test_neighbour(spans):
        with mlflow.start_span("root"):
            pass
        assert spans.one("root").parent_id is None
    """
    result = run(test_fixture=test)
    result.assert_outcomes(passed=2, warnings=1)
    result.stdout.fnmatch_lines(["*test_fixture.py:7: OrphanedSpanWarning: Span 'leaked' *"])


def test_a_failing_assertion_shows_the_tree(run: Run) -> None:
    test = """
    from spanguard import traced_span

    def test_missing(spans):
        with traced_span("root"), traced_span("child"):
            pass
        spans.one("grandchild")
    """
    result = run(test_fixture=test)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       spans.one(*",
            "E       AssertionError: There is no span of the name 'grandchild' *",
            "E       trace tr-*",
            "E       *root*",
            "E       *child*",
            "test_fixture.py:6: AssertionError",  # and not a line of the plugin's
        ]
    )


# -- async tests -------------------------------------------------------------------------------

ASYNC = """
import mlflow, pytest{imports}
from spanguard import traced_span

kept = []

@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"

@{fixture}(scope="module")
async def service():
    async with traced_span("service") as span:
        yield span

@pytest.mark.{marker}
async def test_left_open(service):
    kept.append(mlflow.start_span("left open"))
    kept[-1].__enter__()

@pytest.mark.{marker}
async def test_left_active(service):
    assert mlflow.get_current_active_span().span_id == service.span_id
    kept.append(mlflow.start_span("left active"))
    kept[-1].__enter__().end()

@pytest.mark.{marker}
async def test_neighbour(service, spans):
    assert mlflow.get_current_active_span().span_id == service.span_id
    async with traced_span("fine"):
        pass
    assert spans.names == ["fine"]

@pytest.mark.{marker}
async def test_fails(service):
    assert 1 == 2

@pytest.mark.{marker}
@pytest.mark.spanguard_allow_open_spans
async def test_allowed(service):
    kept.append(mlflow.start_span("allowed"))
    kept[-1].__enter__()

def test_last():
    pass
"""


def check_async(result: pytest.RunResult) -> None:
    result.assert_outcomes(passed=3, failed=3)
    result.stdout.fnmatch_lines(
        [
            "*test_left_open FAILED*",
            "*test_left_active FAILED*",
            "*test_neighbour PASSED*",
            "*test_fails FAILED*",
            "*test_allowed PASSED*",
            "*test_last PASSED*",
            "Span 'left open' (*) was left open, opened at *test_async.py:18 in test_left_open.",
            "Span 'left active' (*) has ended but was left active, opened at *:24 in *",
            "*assert 1 == 2",
        ]
    )


# MLflow 3.10 raises where a block of its own is collected in another context.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_anyio_whose_context_goes_on_to_the_next_test(run: Run) -> None:
    test = ASYNC.format(imports="", marker="anyio", fixture="pytest.fixture")
    check_async(run("--spanguard-strict", "-v", test_async=test))


def test_pytest_asyncio(run_elsewhere: Run, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = module\n")
    marker, fixture = 'asyncio(loop_scope="module")', "pytest_asyncio.fixture"
    test = ASYNC.format(imports=", pytest_asyncio", marker=marker, fixture=fixture)
    check_async(run_elsewhere("--spanguard-strict", "-v", test_async=test))


# -- the example -------------------------------------------------------------------------------

EXAMPLE = (ROOT / "examples" / "test_with_plugin.py").read_text(encoding="utf-8")


def test_the_example(run_elsewhere: Run, store: Store) -> None:
    result = run_elsewhere("--spanguard-strict", "--strict-markers", test_with_plugin=EXAMPLE)
    result.assert_outcomes(passed=4)
    assert store.rows() == 0


def test_the_example_and_the_fault_that_it_speaks_of(run_elsewhere: Run) -> None:
    broken = EXAMPLE.replace("    finally:\n", "    except KeyError:\n")
    assert broken != EXAMPLE
    result = run_elsewhere("--spanguard-strict", test_with_plugin=broken)
    result.assert_outcomes(passed=3, failed=1)
    line = EXAMPLE.partition('start_trace("read prices")')[0].count("\n") + 1
    result.stdout.fnmatch_lines([f"*opened at *test_with_plugin.py:{line} in read_prices."])


# -- other processes ---------------------------------------------------------------------------

NO_STORE = """
import pytest

pytestmark = pytest.mark.usefixtures("spans")
"""


def test_xdist(run_elsewhere: Run) -> None:
    test = LEAKS + NO_STORE
    result = run_elsewhere("--spanguard-strict", "-n", "2", test_one=test, test_two=test)
    result.assert_outcomes(passed=6, failed=6)
    result.stdout.fnmatch_lines(["Span 'by raw' (*opened at *test_*.py:7 in test_raw."])


UNUSED = """
import atexit, sys

def imported():
    ours = sorted(name for name in sys.modules if "spanguard" in name)
    print("imported:", "mlflow" in sys.modules, *ours)

atexit.register(imported)
"""
LIGHT = "_spanguard_pytest_plugin"


def test_a_run_that_uses_none_of_it_imports_nothing(run_elsewhere: Run) -> None:
    result = run_elsewhere(conftest=UNUSED, test_own="def test_own(): pass")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"imported: False {LIGHT}"])


def test_the_plugin_can_be_left_out(run_elsewhere: Run) -> None:
    result = run_elsewhere(
        "-p", "no:spanguard", conftest=UNUSED, test_own="def test_own(spans): pass"
    )
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*fixture 'spans' not found*", "imported: False"])

"""The pytest plugin, as pytest runs it: mostly in this process, elsewhere where that matters."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

# Before pytester takes its snapshots of sys.modules, which would import these again each time.
import _spanguard_pytest_plugin  # noqa: F401
import spanguard.pytest_plugin
import spanguard.render
import spanguard.testing
from spanguard import traced_span
from tests.store import Store

ROOT = Path(__file__).parents[2]

LEAKS = """
import mlflow, spanguard
from spanguard import traced_span

kept = []

def test_raw():
    kept.append(mlflow.MlflowClient().start_trace("by raw"))

def test_after_raw():
    assert spanguard.open_spans() == []

def test_fluent():
    kept.append(mlflow.start_span("by fluent"))
    kept[-1].__enter__()

def test_after_fluent(spans):
    assert mlflow.get_current_active_span() is None
    with mlflow.start_span("root"):
        pass
    assert spans.one("root").parent_id is None

def test_block():
    kept.append(traced_span("by block"))
    kept[-1].__enter__()

def test_after_block():
    assert mlflow.get_current_active_span() is None
"""


class Flushing:
    """Waits for MLflow's export thread, which imports modules while pytester goes through them."""

    def pytest_sessionfinish(self) -> None:
        assert spanguard.flush(60)


class Run(Protocol):
    def __call__(self, *arguments: str, **files: str) -> pytest.RunResult: ...


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """A PYTHONPATH on which spanguard is installed as pyproject.toml says.

    Whatever the environment of this test run has installed: an older version, or none.
    """
    metadata = tmp_path / "installed" / "spanguard_under_test-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Name: spanguard-under-test\nVersion: 0\n")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = pyproject.partition("[project.entry-points.pytest11]\n")[2].partition("\n\n")[0]
    entry_points = "[pytest11]\n" + table.replace('"', "")
    (metadata / "entry_points.txt").write_text(entry_points)
    return os.pathsep.join([str(metadata.parent), str(ROOT / "src")])


@pytest.fixture
def run(
    pytester: pytest.Pytester, installed: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Run]:
    """Run pytest in this process, with the plugin, on files given by name."""
    for path in reversed(installed.split(os.pathsep)):
        monkeypatch.syspath_prepend(path)

    def run(*arguments: str, **files: str) -> pytest.RunResult:
        pytester.makepyfile(**files)
        without = [f"-pno:{name}" for name in ("cacheprovider", "asyncio", "hypothesispytest")]
        return pytester.runpytest_inprocess(*without, *arguments, plugins=[Flushing()])

    yield run
    # MLflow's blocks that were left open set what is active when they are collected: now, then,
    # and not in the middle of another test.
    gc.collect()
    assert spanguard.flush(60)


@pytest.fixture
def run_elsewhere(
    pytester: pytest.Pytester, installed: str, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run pytest in a process of its own, which gets to know the plugin by its entry point."""
    monkeypatch.setenv("PYTHONPATH", installed)

    def run(*arguments: str, **files: str) -> pytest.RunResult:
        pytester.makepyfile(**files)
        without = [f"-pno:{name}" for name in ("cacheprovider", "hypothesispytest")]
        return pytester.runpytest_subprocess(*without, *arguments)

    return run


# -- a test that leaks -------------------------------------------------------------------------


def test_a_test_that_leaks_fails_with_the_line_and_its_neighbour_passes(run: Run) -> None:
    result = run("--spanguard-strict", "-v", test_leaks=LEAKS)
    result.assert_outcomes(passed=3, failed=3)
    for name, line in (("raw", 7), ("fluent", 14), ("block", 24)):
        result.stdout.fnmatch_lines(
            [
                f"*test_{name} FAILED*",
                f"Span 'by {name}' (*) was left open, *test_leaks.py:{line} in test_{name}.",
                "Closed now, as ERROR. End each span where its work ends, *",
            ]
        )
        result.stdout.fnmatch_lines([f"*test_after_{name} PASSED*"])
    assert os.environ.get("SPANGUARD_STRICT") is None


def test_without_the_option_nothing_fails(run: Run) -> None:
    result = run(test_leaks=LEAKS.partition("def test_after_raw")[0])
    result.assert_outcomes(passed=1)
    spanguard.close_open_spans()


def test_the_ini_option(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nspanguard_strict = true\n")
    run(test_leaks=LEAKS).assert_outcomes(passed=3, failed=3)


def test_the_line_is_that_of_the_application(run: Run) -> None:
    application = """
    import mlflow

    def start_job():
        return mlflow.start_span_no_context("job")
    """
    test = """
    import application

    def test_job():
        application.start_job()
    """
    result = run("--spanguard-strict", application=application, test_job=test)
    result.stdout.fnmatch_lines(["Span 'job' (*opened at *application.py:4 in start_job."])


def test_a_span_left_open_in_a_thread(run: Run) -> None:
    test = """
    import mlflow, threading

    def test_thread():
        thread = threading.Thread(target=mlflow.start_span_no_context, args=("in thread",))
        thread.start()
        thread.join()
    """
    result = run("--spanguard-strict", test_thread=test)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["Span 'in thread' (*) was left open, *"])


def test_a_span_that_ended_but_was_left_active(run: Run) -> None:
    test = """
    import mlflow

    kept = []

    def test_leaves_it_active():
        kept.append(mlflow.start_span("left active"))
        kept[-1].__enter__().end()

    def test_neighbour(spans):
        with mlflow.start_span("root"):
            pass
        assert spans.names == ["root"]
        assert spans.one("root").parent_id is None
    """
    result = run("--spanguard-strict", test_active=test)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["Span 'left active' (*) has ended but was left active, opened at *test_active.py:7 in *"]
    )


def test_leaks_that_a_test_did_not_see(run: Run) -> None:
    test = """
    import gc, mlflow, pytest, spanguard

    def test_dropped():
        spanguard.traced_span("dropped").__enter__()
        gc.collect()

    def test_under_an_exception():
        client = mlflow.MlflowClient()
        with pytest.raises(ValueError):
            with spanguard.traced_span("root") as root:
                client.start_span("forgotten", root.trace_id, root.span_id)
                raise ValueError

    def test_neighbour():
        pass
    """
    result = run("--spanguard-strict", "-W", "ignore", test_unseen=test)
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "Span 'dropped' *test_unseen.py:4 in test_dropped, was garbage-collected *",
            "*'forgotten' *test_unseen.py:11 in test_under_an_exception.*",
        ]
    )


# -- what else a test may do -------------------------------------------------------------------


def test_the_failure_of_a_test_stays_and_its_leak_is_added(run: Run) -> None:
    test = """
    import mlflow

    def test_both():
        mlflow.start_span_no_context("left open")
        assert 1 == 2
    """
    result = run("--spanguard-strict", test_both=test)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*assert 1 == 2",
            "*spanguard: left open by this test*",
            "Span 'left open' (*) was left open, opened at *test_both.py:4 in test_both.",
            "FAILED *test_both - assert 1 == 2",
        ]
    )


def test_a_test_that_skips_itself_or_is_expected_to_fail(run: Run) -> None:
    test = """
    import mlflow, pytest

    def test_skips():
        mlflow.start_span_no_context("before the skip")
        pytest.skip("no")

    def test_just_skips():
        pytest.skip("no")

    @pytest.mark.xfail(strict=True)
    def test_expected():
        mlflow.start_span_no_context("expected")
    """
    result = run("--spanguard-strict", test_skip=test)
    result.assert_outcomes(failed=1, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines(["Span 'before the skip' (*"])


def test_unittest(run: Run) -> None:
    test = """
    import unittest, mlflow, spanguard
    from spanguard import traced_span

    class Closes(unittest.TestCase):
        @classmethod
        def setUpClass(cls):
            cls.held = spanguard.TraceStateManager()
            cls.held.push_trace("of the class")

        @classmethod
        def tearDownClass(cls):
            cls.held.pop_trace()

        def setUp(self):
            self.manager = spanguard.TraceStateManager()
            self.manager.push_trace("of the test")

        def tearDown(self):
            self.manager.pop_trace()

        def test_one(self):
            with traced_span("inside"):
                pass

        def test_two(self):
            self.assertEqual(mlflow.get_current_active_span().name, "of the test")

    class Leaks(unittest.TestCase):
        def test_leaks(self):
            mlflow.start_span_no_context("in unittest")

        def test_leaks_and_fails(self):
            mlflow.start_span_no_context("in a failing one")
            self.fail("its own failure")

        def test_neighbour(self):
            pass

    class Async(unittest.IsolatedAsyncioTestCase):
        async def test_leaks(self):
            mlflow.start_span_no_context("in async unittest")

        async def test_closes(self):
            async with traced_span("inside"):
                pass
    """
    result = run("--spanguard-strict", test_case=test)
    result.assert_outcomes(passed=4, failed=3)
    result.stdout.fnmatch_lines(
        [
            "Span 'in unittest' (*test_case.py:30 in test_leaks.",
            "*its own failure",
            "Span 'in a failing one' (*test_case.py:33 in test_leaks_and_fails.",
            "Span 'in async unittest' (*test_case.py:41 in test_leaks.",
        ]
    )


# -- fixtures ----------------------------------------------------------------------------------


def test_fixtures_that_close_what_they_open(run: Run) -> None:
    test = """
    import mlflow, pytest
    from spanguard import traced_span

    @pytest.fixture(scope="session")
    def job():
        with traced_span("job") as span:
            yield span

    @pytest.fixture(scope="module")
    def fluent(job):
        with mlflow.start_span("fluent") as span:
            yield span

    @pytest.fixture
    def request_span(fluent):
        with traced_span("request") as span:
            yield span

    def active():
        return mlflow.get_current_active_span().span_id

    def test_one(request_span):
        assert active() == request_span.span_id

    def test_two(fluent):
        assert active() == fluent.span_id
        with traced_span("inside") as span:
            assert span.parent_id == fluent.span_id

    def test_three(request_span):
        assert active() == request_span.span_id

    def test_four():
        assert mlflow.get_current_active_span() is not None
    """
    other = """
    import mlflow

    def test_of_another_module(job):
        assert mlflow.get_current_active_span().span_id == job.span_id
    """
    conftest = test.partition("def active")[0]
    result = run("--spanguard-strict", conftest=conftest, test_a=test, test_b=other)
    result.assert_outcomes(passed=5)


def test_a_fixture_that_is_set_up_in_the_middle_of_a_test(run: Run) -> None:
    test = """
    import pytest
    from spanguard import traced_span

    @pytest.fixture(scope="module")
    def job():
        with traced_span("job") as span:
            yield span

    def test_one(request):
        request.getfixturevalue("job")

    def test_two(job):
        assert job.end_time_ns is None
    """
    run("--spanguard-strict", test_a=test).assert_outcomes(passed=2)


def test_fixtures_that_leak_are_errors_of_the_teardown(run: Run) -> None:
    test = """
    import mlflow, pytest

    @pytest.fixture
    def of_a_test():
        mlflow.start_span_no_context("by a fixture")

    @pytest.fixture(scope="module")
    def of_a_module():
        mlflow.start_span_no_context("by a module's fixture")

    def test_one(of_a_test):
        pass

    def test_two(of_a_module):
        pass

    def test_three(of_a_module):
        pass
    """
    result = run("--spanguard-strict", "-v", test_a=test, test_b="def test_last(): pass")
    result.assert_outcomes(passed=4, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*test_one ERROR*",
            "*test_three ERROR*",
            "Span 'by a fixture' (*test_a.py:5 in of_a_test.",
            'Span "by a module\'s fixture" (*test_a.py:9 in of_a_module.',
        ]
    )


def test_a_setup_that_fails_and_leaks(run: Run) -> None:
    test = """
    import mlflow, pytest, spanguard

    @pytest.fixture
    def broken():
        mlflow.start_span_no_context("by a broken fixture")
        raise ValueError("its own failure")

    def test_one(broken):
        pass

    def test_neighbour():
        assert spanguard.open_spans() == []
    """
    result = run("--spanguard-strict", test_a=test)
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(["*its own failure", "Span 'by a broken fixture' (*"])


# -- the marker --------------------------------------------------------------------------------


def test_the_marker_allows_it_for_a_test_a_class_and_a_module(run: Run) -> None:
    one = """
    import mlflow, os, pytest, spanguard

    @pytest.mark.spanguard_allow_open_spans
    def test_function():
        mlflow.start_span_no_context("allowed")

    def test_closed_all_the_same():
        assert spanguard.open_spans() == []
        assert os.environ["SPANGUARD_STRICT"] == "1"

    @pytest.mark.spanguard_allow_open_spans(reason="it tests the warning")
    class TestClass:
        def test_strict_mode_is_off(self):
            client = mlflow.MlflowClient()
            with pytest.warns(spanguard.OrphanedSpanWarning):
                with spanguard.traced_span("root") as root:
                    client.start_span("leaked", root.trace_id, root.span_id)

        def test_active(self):
            self.block = mlflow.start_span("block")
            self.block.__enter__()

        def test_restored_all_the_same(self):
            assert mlflow.get_current_active_span() is None
    """
    other = """
    import mlflow, pytest

    pytestmark = pytest.mark.spanguard_allow_open_spans

    def test_module():
        mlflow.start_span_no_context("allowed")
    """
    result = run("--spanguard-strict", "--strict-markers", test_one=one, test_other=other)
    result.assert_outcomes(passed=6)


def test_the_marker_is_known_without_the_option(run: Run) -> None:
    test = """
    import pytest

    @pytest.mark.spanguard_allow_open_spans
    def test_marked():
        pass
    """
    run("--strict-markers", test_marked=test).assert_outcomes(passed=1)
    listed = run("--markers", test_marked=test)
    listed.stdout.fnmatch_lines(["@pytest.mark.spanguard_allow_open_spans*"])


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

"""The pytest plugin names what leaks: tests and fixtures of all kinds, and what may."""

from __future__ import annotations

import os

import pytest

import spanguard
from tests.testing.plugin_runs import LEAKS, Run

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

"""Guarded clients, and where the items of a batch run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
from mlflow import MlflowClient

import spanguard
from spanguard import guard


@pytest.fixture
def guarded() -> spanguard._api.guarded_client.GuardedClient:
    return guard(MlflowClient())


@pytest.fixture(params=["given", "made late"])
def either(request: pytest.FixtureRequest) -> spanguard._api.guarded_client.GuardedClient:
    """A guard of a given client, which is called; and one without, which does the same."""
    return guard(MlflowClient()) if request.param == "given" else guard()


@pytest.fixture(params=["here", "threads"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor | None]:
    if request.param == "here":
        yield None
        return
    with ThreadPoolExecutor(2) as pool:
        yield pool

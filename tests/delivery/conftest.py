"""Delivery that is on in a test: the set-up of each test switches it off afterwards."""

from __future__ import annotations

import pytest

import spanguard


@pytest.fixture
def delivering() -> None:
    """Whole traces are delivered by spanguard, without the second that they wait for others."""
    spanguard.deliver(interval_seconds=0.05)

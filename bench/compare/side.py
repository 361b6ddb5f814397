"""The pytest plugin with which ``bench.compare.trees`` drives the micro suite of one tree, case by case.

``bench.compare.trees`` loads it into a process for each tree, whose ``bench/micro`` need not know of it: every call of
pytest-benchmark's ``benchmark`` fixture lands here. It imports nothing of the project, so that any tree can be its.
"""

import ctypes
import os
import time
from functools import partial
from multiprocessing.connection import Client
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

WARM_UP = 3  # calls: allocators, caches of plans, lazily made kernels

_parent = Client(os.environ["WAM_COMPARE_ADDRESS"])
_counts = Path(os.environ["WAM_COMPARE_COUNTS"])
_shim = ctypes.CDLL(shim) if (shim := os.environ["WAM_COMPARE_SHIM"]) else None  # switches callgrind on and off


def pytest_configure(config: pytest.Config) -> None:
    setattr(BenchmarkFixture, "__call__", _measure)  # noqa: B010 - a method, which mypy lets no assignment change


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _parent.send([item.name for item in items])
    chosen = {name: position for position, name in enumerate(_parent.recv())}
    items[:] = sorted((item for item in items if item.name in chosen), key=lambda item: chosen[item.name])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    if call.excinfo is not None:
        _parent.send(("failed", item.name, call.excinfo.exconly()))
    return (yield)


def _measure(fixture: BenchmarkFixture, function, *args, **kwargs):
    if _shim is not None:
        _shim.instrument()
    for _ in range(WARM_UP):
        result = function(*args, **kwargs)
    _parent.send(("ready", fixture.name))
    while (calls := _parent.recv()) is not None:
        call = partial(function, *args, **kwargs)
        cost = _cpu_seconds(call, calls) if _shim is None else _instructions(_shim, call, calls)
        _parent.send(cost / calls)
    return result


def _cpu_seconds(function, calls: int) -> float:
    begin = time.process_time()
    for _ in range(calls):
        function()
    return time.process_time() - begin


def _instructions(shim: ctypes.CDLL, function, calls: int) -> int:
    """Counted by callgrind, in which this process then runs."""
    before = set(_counts.iterdir())
    shim.start()
    for _ in range(calls):
        function()
    shim.stop()
    (dump,) = set(_counts.iterdir()) - before
    lines = dump.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(("totals:", "summary:")))

"""A simulator in a process of its own: one that raises, hangs or crashes costs its episode and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from .expert import demonstrate
from .named import Cameras, is_adapter, load
from .protocol import Executed, Observation, checked_observation, checked_outcome, execute

TIMEOUT = 120.0  # seconds within which a simulator answers; building LIBERO's takes up to 25


class SimulatorFailure(Exception):
    """The simulator raised, hung, died or returned what is no observation; the message says which."""


@dataclass(frozen=True)
class Description:
    """What a simulator says of itself."""

    instruction: str
    horizon: int
    control_freq: float
    action_names: tuple[str, ...]
    state_names: tuple[str, ...]
    has_expert: bool


@dataclass(frozen=True, eq=False)
class Begun:
    """An episode's beginning."""

    initial_state: dict[str, Any]
    observation: Observation


class SimulatorProcess:
    """Requests to a simulator that lives elsewhere: :meth:`send` one, then :meth:`receive` its answer.

    A process that failed is replaced when the next request is sent. Close it, or use it in a ``with`` statement.

    Args:
        cameras: As of :func:`~.named.load`.
        timeout: Seconds within which each answer must come.
    """

    def __init__(self, cameras: Cameras | None = None, *, timeout: float = TIMEOUT) -> None:
        self.cameras, self.timeout = dict(cameras or {}), timeout
        self._process: Any = None
        self.connection: Connection | None = None
        self._name = ""
        self.deadline = 0.0  # of the answer that is due

    def describe(self, name: str) -> Description:
        """What the simulator ``name`` says of itself. Raises SimulatorFailure."""
        self.send("describe", name)
        return self.receive()

    def send(self, request: str, name: str, *args: Any) -> None:
        """Ask for ``describe()``, ``begin(seed or initial state)``, ``run(actions, every)``, ``expert(seed or initial
        state, horizon)`` or ``demonstrate(...)``, as :func:`~.expert.demonstrate`, of simulator ``name``."""
        if self.connection is None:
            context = _context(name)
            self.connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self.cameras, str(Path.cwd())), daemon=True)
            self._process.start()
            theirs.close()
        self._name, self.deadline = name, time.monotonic() + self.timeout
        try:
            self.connection.send((request, name, args))
        except OSError:  # it died since; receive says so
            pass

    def receive(self) -> Any:
        """The answer to the last request.

        Raises:
            SimulatorFailure: the simulator raised, did not answer in time, or its process died.
        """
        assert self.connection is not None, "receive follows send"
        try:
            if not self.connection.poll(max(0.0, self.deadline - time.monotonic())):
                self.close()
                raise SimulatorFailure(f"{self._name} hung: no answer within {self.timeout:g} s")
            failed, answer = self.connection.recv()
        except (EOFError, OSError):
            process = self._process
            process.join(5)
            self.close()
            raise SimulatorFailure(f"{self._name} died: its process ended with code {process.exitcode}") from None
        if failed:
            raise SimulatorFailure(f"{self._name} failed: {answer}")
        return answer

    @property
    def holds(self) -> str | None:
        """The simulator that it made last."""
        return self._name if self.connection is not None else None

    def close(self) -> None:
        """End the process."""
        if self.connection is not None:
            self.connection.close()
            self._process.kill()
            self._process.join()
            self.connection = self._process = None

    def __enter__(self) -> SimulatorProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SimulatorPool:
    """Processes that stay, with the simulators that they have made: making one costs a second or more.

    Close it, or use it in a ``with`` statement.

    Args:
        count: Of processes.
        cameras: As of :func:`~.named.load`.
        timeout: Seconds within which each answer must come.
    """

    def __init__(self, count: int, cameras: Cameras | None = None, *, timeout: float = TIMEOUT) -> None:
        self.processes = [SimulatorProcess(cameras, timeout=timeout) for _ in range(count)]
        self._described: dict[str, Description] = {}

    def describe(self, name: str) -> Description:
        """What the simulator ``name`` says of itself, asked once. Raises SimulatorFailure."""
        if name not in self._described:
            self._described[name] = self.processes[len(self._described) % len(self.processes)].describe(name)
        return self._described[name]

    def close(self) -> None:
        """End all processes; each begins anew when it is needed."""
        for process in self.processes:
            process.close()

    def __enter__(self) -> SimulatorPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def first_answer(processes: Sequence[SimulatorProcess]) -> SimulatorProcess:
    """One of these, each with a request sent, whose answer is there or whose time is up."""
    soonest = min(processes, key=lambda process: process.deadline)
    connections: dict[Any, SimulatorProcess] = {process.connection: process for process in processes}
    ready = wait(list(connections), max(0.0, soonest.deadline - time.monotonic()))
    return connections[ready[0]] if ready else soonest


def _context(name: str) -> Any:
    """Processes that fork from a server without threads, which has imported what takes long."""
    context = multiprocessing.get_context("forkserver")
    suite = [f"{__package__}.preload"] if name.startswith("metaworld/") else []
    context.set_forkserver_preload([__name__, *suite])
    return context


def _serve(connection: Connection, cameras: Cameras, folder: str) -> None:
    """Answers requests until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and closes the connection
    os.chdir(folder)
    sys.path.insert(0, folder)
    name, simulator = "", None
    while True:
        try:
            request, wanted, args = connection.recv()
        except EOFError:
            return
        try:
            if wanted != name:
                simulator, name = None, ""  # the old one goes first: two live renderers in one process can mix
                simulator, name = load(wanted, cameras), wanted
            answer = False, REQUESTS[request](simulator, *args)
        except Exception as error:
            answer = True, f"{type(error).__name__}: {error}"
        try:
            connection.send(answer)
        except OSError:
            return


def _describe(simulator: Any) -> Description:
    if is_adapter(simulator):
        raise ValueError(
            f"a {type(simulator).__name__} has reset and step alone, which start no episode twice; give it the methods "
            "of wam_models.simulator.Simulator"
        )
    texts = simulator.instruction, int(simulator.horizon), float(simulator.control_freq)
    names = tuple(simulator.action_names), tuple(simulator.state_names)
    return Description(*texts, *names, callable(getattr(simulator, "expert", None)))


def _begin(simulator: Any, start: int | dict[str, Any]) -> Begun:
    initial_state = simulator.initial_state(start) if isinstance(start, int) else start
    simulator.reset(initial_state)
    where = f"{type(simulator).__name__}.observe"
    return Begun(initial_state, checked_observation(where, simulator.observe(), len(simulator.state_names)))


def _run(simulator: Any, actions: Sequence | np.ndarray, every: int) -> Executed:
    return execute(simulator, np.asarray(actions, np.float32), every, type(simulator).__name__)


def _expert(simulator: Any, start: int | dict[str, Any], horizon: int) -> tuple[Begun, np.ndarray, bool]:
    """How an episode begins, what the scripted expert does in it, and whether that succeeds."""
    begun, success = _begin(simulator, start), False
    actions: list[np.ndarray] = []
    while len(actions) < horizon and not success:
        actions.append(np.asarray(simulator.expert(), np.float32))
        success = checked_outcome(f"{type(simulator).__name__}.act", simulator.act(actions[-1].copy())).success
    return begun, np.stack(actions), success


REQUESTS: dict[str, Callable[..., Any]] = {
    "describe": _describe,
    "begin": _begin,
    "run": _run,
    "expert": _expert,
    "demonstrate": demonstrate,
}

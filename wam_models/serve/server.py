"""A policy server: the protocol of ``openpi-client``, several robots in one batch.

A client connects, gets the server's metadata, and then sends an observation and gets actions, again and again
(``openpi_client.WebsocketClientPolicy.infer``). What is wrong with a message is answered by a text in place of bytes,
which the client raises, and the connection is closed, as openpi's own server does.

A message has these keys:

- ``prompt``: the instruction.
- ``observation/state``: floats ``[S]`` or ``[K, S]``; ``observation/CAMERA``: uint8 ``[H, W, 3]`` or
  ``[K, H, W, 3]``. Which of them are needed, the metadata says.
- ``executed``, optional: the actions that led to these K observations from the last one that was sent, ``[K n, A]``,
  or how many of the last answer's they were. Without it the observation stands alone, as it does for openpi's
  policies: an episode begins.
- ``committed``, optional: the first actions of the answer, ``[m, A]``, because they will be executed before it is
  there; or how many of the last answer's they are, after the executed ones.
- ``seed``, optional: of an episode that begins.

The answer has ``actions``, float32 ``[F n, A]``, and ``server_timing``.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.sync.server import ServerConnection, serve

from wam_kernels import __version__

from ..rollout.robots import Request, RobotBatch
from ..runtime.checks import whole
from .metrics import Metrics
from .wire import pack, unpack

LOOPBACK = "127.0.0.1"
PREFIX = "observation/"
STATE = PREFIX + "state"
KEYS = ("prompt", "executed", "committed", "seed")
MOST_CHUNKS = 4  # of observations in one message
# Seconds that a prediction waits for robots that are connected and have not asked yet. Without, two robots that ask
# as soon as they are answered take turns for ever, each with a prediction of its own.
GATHER = 0.005
LONGEST = 1000  # characters of an error, which may quote what came
# of websockets: what the other side is told when a connection ends
TOO_BIG, ERROR, LATER = 1009, 1011, 1013


class PolicyServer:
    """Serves the robots of a batch, until it is closed; a context manager that serves in a thread.

    Args:
        robots: Warm, as they are when they were made.
        host: Address to listen on; whoever reaches it can use the policy.
        port: 0: one that is free.
        gather: Seconds that a prediction waits for robots that are connected and have not asked yet.

    Attributes:
        host: That it listens on.
        port: Of it.
        metadata: What every client is told first.
        metrics: What ``/metrics`` shows.

    Raises:
        OSError: the address is taken, or none of this machine.
    """

    def __init__(
        self, robots: RobotBatch, *, host: str = LOOPBACK, port: int = 8000, gather: float = GATHER
    ) -> None:  # fmt: skip
        self.robots, self.gather, self.metrics = robots, gather, Metrics()
        policy = robots.policy
        frame = 4 * robots.width + sum(3 * h * w for h, w in policy.cameras.values())
        action = 8 * len(policy.action_mean) * policy.actions_per_frame
        self.max_bytes = 2**16 + MOST_CHUNKS * robots.episode.chunk_size * (frame + action)
        self.metadata: dict[str, Any] = {
            "server": f"wam-kernels {__version__}",
            "actions": robots.horizon,
            "actions_per_frame": policy.actions_per_frame,
            "action_dim": len(policy.action_mean),
            "state_dim": robots.width,
            "cameras": {name: list(size) for name, size in policy.cameras.items()},
            "max_bytes": self.max_bytes,
        }
        self._free, self._lock = set(range(robots.places)), threading.Lock()
        self._waiting: queue.Queue[tuple[int, Request, Future] | None] = queue.Queue()
        self._worker = threading.Thread(target=self._work, name="policy", daemon=True)
        self._server = serve(
            self._handle, host, port, compression=None, max_size=self.max_bytes, process_request=self._process_request
        )
        self.host, self.port = self._server.socket.getsockname()[:2]
        self._accepting = threading.Thread(target=self._server.serve_forever, name="listener", daemon=True)

    def __enter__(self) -> PolicyServer:
        self._worker.start()
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self) -> None:
        """Serve in this thread, until another one calls :meth:`close`, or KeyboardInterrupt."""
        with self:
            self._accepting.join()

    def close(self) -> None:
        """Stop listening; connections end, after the prediction at work."""
        self._server.shutdown()
        self._waiting.put(None)
        for thread in (self._accepting, self._worker):
            if thread.is_alive():
                thread.join()

    # ---- connections ----

    def _process_request(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        if request.path == "/healthz":
            return connection.respond(200, "OK\n")
        if request.path == "/metrics":
            body = self.metrics.text(robots=self._connected(), places=self.robots.places).encode()
            headers = Headers({"Content-Type": "text/plain; version=0.0.4", "Content-Length": str(len(body))})
            return Response(200, "OK", headers, body)
        if self._connected() == self.robots.places:
            self.metrics.count("wam_errors_total", "full")
            return connection.respond(503, f"all {self.robots.places} places are taken; wam serve --robots N\n")
        return None

    def _connected(self) -> int:
        with self._lock:
            return self.robots.places - len(self._free)

    def _handle(self, connection: ServerConnection) -> None:
        with self._lock:
            place = self._free.pop() if self._free else None
        if place is None:  # another was faster
            self.metrics.count("wam_errors_total", "full")
            connection.close(LATER, "all places are taken")
            return
        self.metrics.count("wam_connections_total")
        try:
            connection.send(pack(self.metadata))
            self._serve(connection, place)
        except ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code == TOO_BIG:
                self.metrics.count("wam_errors_total", "oversized")
        finally:  # its last request is answered: nothing of it is under way
            self.robots.leave(place)
            with self._lock:
                self._free.add(place)

    def _serve(self, connection: ServerConnection, place: int) -> None:
        last, total = None, None
        for data in connection:
            began = time.perf_counter()
            try:
                request = request_of(data, last, self.robots.policy.actions_per_frame)
                future: Future[np.ndarray] = Future()
                self._waiting.put((place, request, future))
                last = future.result()
            except ValueError as error:
                self.metrics.count("wam_errors_total", "malformed")
                connection.send(str(error)[:LONGEST])
                connection.close(ERROR, "the message before this says why")
                return
            seconds = time.perf_counter() - began
            timing = {"infer_ms": 1000 * seconds}
            if total is not None:
                timing["prev_total_ms"] = 1000 * total
            self.metrics.answered(seconds)  # before the client can ask for the metrics
            connection.send(pack({"actions": last, "server_timing": timing}))
            total = time.perf_counter() - began

    # ---- the batch ----

    def _work(self) -> None:
        """Answers all that waits at once, then what came meanwhile."""
        while True:
            waiting, until = [self._waiting.get()], time.perf_counter() + self.gather
            with suppress(queue.Empty):
                while len(waiting) < self._connected():
                    waiting.append(self._waiting.get(timeout=max(until - time.perf_counter(), 0)))
            batch = [entry for entry in waiting if entry is not None]
            self._answer(batch)
            if len(batch) < len(waiting):  # closed
                return

    def _answer(self, batch: list[tuple[int, Request, Future]]) -> None:
        if not batch:
            return
        answers: Mapping[int, np.ndarray | ValueError]
        try:
            answers = self.robots.act({place: request for place, request, _ in batch})
        except Exception as error:  # whatever it was, no robot must wait for ever
            failed = ValueError(f"server: prediction failed with {type(error).__name__}: {error}")
            answers = {place: failed for place, _, _ in batch}
        self.metrics.count("wam_batches_total")
        for place, _, future in batch:
            answer = answers[place]
            if isinstance(answer, ValueError):
                future.set_exception(answer)
            else:
                future.set_result(answer)


def request_of(data: bytes | str, last: np.ndarray | None, actions_per_frame: int) -> Request:
    """What a message asks for.

    Args:
        data: As it came.
        last: The actions of the last answer, ``[F n, A]``.
        actions_per_frame: n.

    Raises:
        ValueError: what it is not; the message names the key.
    """
    if isinstance(data, str):
        raise ValueError("message: must be bytes, as openpi-client sends them, got text")
    message = unpack(data)
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise ValueError(f"message: must be a map from strings, got {type(message).__name__}")
    unknown = [key for key in message if key not in KEYS and not key.startswith(PREFIX)]
    if unknown:
        raise ValueError(f"message: keys must be {PREFIX}... or of {KEYS}, got {unknown[:5]}")
    prompt = message.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError(f"message: prompt must be a string, got {type(prompt).__name__}")
    observed = {key: value for key, value in message.items() if key.startswith(PREFIX)}
    for key, value in observed.items():
        if not isinstance(value, np.ndarray):
            raise ValueError(f"message: {key} must be an array, got {type(value).__name__}")
    states = observed.pop(STATE, None)
    if states is not None and states.ndim == 1:
        states = states[None]
    pictures = {key.removeprefix(PREFIX): p[None] if p.ndim == 3 else p for key, p in observed.items()}
    executed = _of_last("executed", message.get("executed"), last, 0)
    begun = 0 if executed is None else len(executed)
    if executed is not None and len(executed) % actions_per_frame:
        raise ValueError(
            f"message: executed must be a multiple of {actions_per_frame}, the actions from one observation to the "
            f"next, got {len(executed)}"
        )
    committed = _of_last("committed", message.get("committed"), last, begun)
    return Request(
        prompt=prompt, states=states, pictures=pictures, executed=executed, committed=committed,
        seed=message.get("seed"),
    )  # fmt: skip


def _of_last(name: str, given: Any, last: np.ndarray | None, first: int) -> np.ndarray | None:
    """The actions themselves; of a number, so many of the last answer's from ``first``."""
    if given is None or (isinstance(given, np.ndarray) and given.ndim):
        return given
    if last is None:
        raise ValueError(f"message: {name} must be left out before the first answer, or the actions themselves")
    return last[first : first + whole(f"message: {name}", given, 1, len(last) - first)]

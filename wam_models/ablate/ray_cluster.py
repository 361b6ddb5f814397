"""Calls on the machines of a Ray cluster (extra ``ray``)."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONNECT = 10.0  # seconds for the head to answer


@contextmanager
def ray_calls(address: str, device: str, shared: Path) -> Iterator[Callable[..., Future[Any]]]:
    """Connect to a cluster; yields what calls a function there: ``submit(function, *args)`` gives a future.

    Every call has a process of its own, one CPU, and with CUDA one GPU. A call whose process or machine is lost is not
    made again: its future raises ``ChildProcessError``. What a function raises, its future raises.

    Args:
        address: ``HOST:PORT`` of the cluster's head, as ``ray start --head`` prints it.
        device: ``cpu`` or ``cuda``.
        shared: A folder that every machine must have under this absolute path.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: no cluster at the address, or one without the CPU or GPU that a call needs; a device by number.
    """
    import ray

    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda with --ray, which numbers the GPUs itself, got {device!r}")
    try:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), CONNECT).close()  # Ray waits for minutes where nobody answers
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--ray {address}: no cluster there ({reason}); start one with `ray start --head`") from error
    try:
        needed = {"CPU": 1, "GPU": 1} if device == "cuda" else {"CPU": 1}
        has = ray.cluster_resources()
        for name, amount in needed.items():
            if has.get(name, 0) < amount:
                raise ValueError(
                    f"--ray {address}: an arm needs one {name}, and the cluster has {has.get(name, 0):g}; "
                    f"add a machine with `ray start --address ...`" + (", or --device cpu" if name == "GPU" else "")
                )
        # a new process for each call: what one leaves behind does not reach the next
        call = ray.remote(num_cpus=1, num_gpus=needed.get("GPU", 0), max_retries=0, max_calls=1)(_call)

        def submit(function: Callable[..., Any], *args: Any) -> Future[Any]:
            return _plain(call.remote(shared, function, *args).future())

        yield submit
    finally:
        ray.shutdown()


def _call(shared: Path, function: Callable[..., Any], *args: Any) -> Any:
    if not shared.exists():
        raise ValueError(f"--ray: {socket.gethostname()} has no {shared}; name an --out that all machines share")
    return function(*args)


def _plain(future: Future[Any]) -> Future[Any]:
    """The same with errors that know nothing of Ray."""
    from ray.exceptions import LocalRayletDiedError, NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

    plain = Future[Any]()

    def end(ended: Future[Any]) -> None:
        error = ended.exception()
        if error is None:
            plain.set_result(ended.result())
        elif isinstance(error, RayTaskError):
            plain.set_exception(error.cause)
        elif isinstance(error, (LocalRayletDiedError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)):
            plain.set_exception(ChildProcessError(str(error).strip().partition("\n")[0]))
        else:
            plain.set_exception(error)

    future.add_done_callback(end)
    return plain

"""``wam serve`` beside the real openpi-client: robots that come, go, die, and send what is no message."""

import os
import random
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

msgpack = pytest.importorskip("msgpack", reason="an extra of wam serve")
websockets = pytest.importorskip("websockets", reason="an extra of wam serve")
client = pytest.importorskip("openpi_client.websocket_client_policy", reason="requirements/openpi_client.txt")

from openpi_client import msgpack_numpy  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from wam_models.cli import main  # noqa: E402
from wam_models.rollout.robots import Request, RobotBatch  # noqa: E402
from wam_models.serve import PolicyServer  # noqa: E402
from wam_models.serve.server import request_of  # noqa: E402
from wam_models.serve.wire import pack, unpack  # noqa: E402

from .policies import CONFIG, of_pictures  # noqa: E402

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
SENT = {"observation/top": PICTURE, "observation/state": np.zeros(3, np.float32), "prompt": "lift"}


@pytest.fixture(scope="module")
def server():
    with PolicyServer(RobotBatch(of_pictures(), CONFIG, places=2), port=0, gather=0.05) as server:
        yield server


@contextmanager
def robot(server):
    """The real client; it has no way to hang up of its own."""
    own = client.WebsocketClientPolicy("127.0.0.1", server.port)
    try:
        yield own
    finally:
        own._ws.close()


def gone(server, robots=0):
    """Wait until the server has noticed who left."""
    for _ in range(200):
        if f"wam_robots {robots}\n" in get(server, "/metrics"):
            return
        time.sleep(0.02)
    raise AssertionError(get(server, "/metrics"))


def get(server, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}") as response:
        return response.read().decode()


def count(server, name):
    return sum(int(line.split()[-1]) for line in get(server, "/metrics").splitlines() if line.startswith(name))


@contextmanager
def raw(server):
    """A connection that has the metadata."""
    with connect(f"ws://127.0.0.1:{server.port}", compression=None, max_size=None) as connection:
        connection.recv()
        yield connection


def test_the_real_client(server):
    # the same without a socket, in a batch of another size
    robots, base = RobotBatch(of_pictures(), CONFIG), {"prompt": "lift", "seed": 3}
    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    states, pictures = np.zeros((1, 3), np.float32), {"top": PICTURE[None]}
    begun = robots.act({0: Request(states=states, pictures=pictures, **base)})[0]
    both = {"top": np.stack([PICTURE] * 2)}
    after = robots.act({0: Request(states=np.repeat(states, 2, 0), pictures=both, executed=begun, **base)})[0]
    last = robots.act({0: Request(states=states, pictures=pictures, executed=np.zeros((2, 2)), **base)})[0]
    with robot(server) as one:
        assert one.get_server_metadata() == {
            "server": server.metadata["server"], "actions": 4, "actions_per_frame": 2, "action_dim": 2, "state_dim": 3,
            "cameras": {"top": [16, 16]}, "max_bytes": server.max_bytes,
        }  # fmt: skip
        first = one.infer(SENT | {"seed": 3})
        assert first["actions"].shape == (4, 2) and first["actions"].dtype == np.float32
        assert first["server_timing"]["infer_ms"] > 0
        same(first["actions"], begun)
        # two observations of two actions each, then one whose actions were others
        twice = {name: np.stack([SENT[name]] * 2) for name in ("observation/top", "observation/state")}
        second = one.infer(SENT | twice | {"executed": 4})
        assert second["server_timing"]["prev_total_ms"] > 0
        same(second["actions"], after)
        third = one.infer(SENT | {"executed": np.zeros((2, 2))})["actions"]
        same(third, last)
        # two of these were executed, the two after them will be before the answer is there
        fourth = one.infer(SENT | {"executed": 2, "committed": 2})["actions"]
        same(fourth[:2], third[2:])
        # without executed an observation stands alone, as for openpi's policies
        same(one.infer(SENT | {"seed": 3})["actions"], begun)
    gone(server)
    with robot(server) as again:  # who connects anew begins anew
        same(again.infer(SENT | {"seed": 3})["actions"], begun)
        with pytest.raises(RuntimeError, match="executed must be a whole number from 1 to 4, got 6"):
            again.infer(SENT | {"executed": 6})
    with robot(server) as again:
        first = again.infer(SENT)["actions"]
        with pytest.raises(RuntimeError, match="committed must be a whole number from 1 to 2, got 3"):
            again.infer(SENT | {"executed": 2, "committed": 3})
    with robot(server) as again, pytest.raises(RuntimeError, match="executed must be left out before the first"):
        again.infer(SENT | {"executed": 2})
    gone(server)


def test_two_robots(server):
    before, ready, found = count(server, "wam_batches_total"), threading.Barrier(2), [[], []]

    def act(number):
        with robot(server) as own:
            ready.wait()
            found[number] = [own.infer(SENT | {"seed": 5 + number})["actions"] for _ in range(20)]

    threads = [threading.Thread(target=act, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, other in (found, found[::-1]):
        assert len(own) == 20 and not np.allclose(own[0], other[0])
        np.testing.assert_array_equal(own, [own[0]] * 20)
    assert count(server, "wam_batches_total") - before < 40  # some of the forty came in one batch
    gone(server)


@pytest.mark.parametrize(
    "message, expected",
    [
        ("text", "must be bytes"),
        (b"\xc1", "no msgpack"),
        (b"", "no msgpack"),
        (b"\x93" * 5000, "no msgpack"),
        (msgpack.packb([1]), "must be a map"),
        (msgpack.packb({1: 2}), "must be a map"),
        (msgpack.packb({"prompt": 3}), "prompt must be a string"),
        (msgpack.packb({"prompt": "lift", "executd": 2}), r"got ['executd']"),
        (msgpack.packb({"prompt": "lift", "observation/top": [1, 2]}), "observation/top must be an array"),
        (msgpack.packb({"prompt": "lift", "x": {b"__ndarray__": True, b"dtype": "|O"}}), "no msgpack"),
        (pack({"prompt": "lift"}), "states must be floats"),
        (pack(SENT | {"observation/top": PICTURE[:8]}), "pictures of top must be uint8"),
        (pack(SENT | {"prompt": "fly"}), "no word of 'fly'"),
        (pack(SENT | {"observation/state": np.full(3, np.inf)}), "states must be finite"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_malformed_messages(server, message, expected):
    """A text that says what is wrong, and the end of the connection; the client raises it."""
    with raw(server) as connection:
        connection.send(message)
        answer = connection.recv()
        assert isinstance(answer, str) and expected in answer and "\n" not in answer
        with pytest.raises(ConnectionClosed):
            connection.recv()
        assert connection.close_code == 1011
    gone(server)


def test_damaged_messages_are_refused_by_value_errors():
    """Whatever a mutation makes of one: other errors would end the thread of its connection without an answer."""
    robots, rng, refused = RobotBatch(of_pictures(), CONFIG), random.Random(0), 0
    last = np.zeros((4, 2), np.float32)
    good = [pack(SENT | {"seed": 3}), pack(SENT | {"executed": last[:2], "committed": 2})]
    for _ in range(400):
        damaged = bytearray(rng.choice(good))
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.choice((rng.randrange(60), len(damaged) - 1 - rng.randrange(200)))
            damaged[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        try:
            answer = robots.act({0: request_of(bytes(damaged), last, 2)})[0]
            refused += isinstance(answer, ValueError)
        except ValueError:
            refused += 1
    assert 200 < refused < 400


def test_the_client_raises_what_is_wrong(server):
    with robot(server) as own:
        with pytest.raises(RuntimeError, match="prompt must be a string, got NoneType"):
            own.infer({"observation/state": np.zeros(3)})
        with pytest.raises(ConnectionClosed):
            own.infer(SENT)
    with robot(server) as own:
        own.infer(SENT)
        with pytest.raises(RuntimeError, match="a multiple of 2.* got 1"):
            own.infer(SENT | {"executed": 1})
    gone(server)


def test_an_oversized_message_is_refused(server):
    with raw(server) as connection:
        connection.send(bytes(server.max_bytes + 1))
        with pytest.raises(ConnectionClosed):
            connection.recv()
        assert connection.close_code == 1009
    gone(server)
    assert count(server, 'wam_errors_total{reason="oversized"}') == 1
    assert len(pack(SENT)) < server.max_bytes


def test_robots_that_die_leave_their_place(server):
    """In the middle of a message, and while their actions are computed."""
    for send in (lambda s: s.sendall(b"\x82"), lambda s: None):
        with raw(server) as connection:
            connection.send(pack(SENT))
            send(connection.socket)
            connection.socket.shutdown(socket.SHUT_RDWR)
    gone(server)
    with robot(server) as one, robot(server) as other:
        for own in (one, other):
            assert np.isfinite(own.infer(SENT)["actions"]).all()
    gone(server)


def test_no_more_robots_than_places(server):
    with robot(server) as one:
        with robot(server):
            with pytest.raises(InvalidStatus, match="503"), robot(server):
                pass
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(server, "/nothing")
            assert "all 2 places are taken" in refused.value.read().decode()
            assert get(server, "/healthz") == "OK\n" and "wam_robots 2\n" in get(server, "/metrics")
        gone(server, 1)
        with robot(server) as other:
            assert other.infer(SENT)["actions"].shape == one.infer(SENT)["actions"].shape == (4, 2)
    gone(server)


def test_a_prediction_that_fails_is_told_and_the_next_goes_on(server, monkeypatch):
    def fail(requests):
        raise RuntimeError("out of memory")

    with robot(server) as own, robot(server) as failing:
        with monkeypatch.context() as patch:
            patch.setattr(server.robots, "act", fail)
            with pytest.raises(RuntimeError, match="prediction failed with RuntimeError: out of memory"):
                failing.infer(SENT)
        assert own.infer(SENT)["actions"].shape == (4, 2)
    gone(server)


def test_closing_ends_connections():
    with PolicyServer(RobotBatch(of_pictures(), CONFIG), port=0) as server:
        assert server.host == "127.0.0.1"
        own = client.WebsocketClientPolicy("127.0.0.1", server.port)
        with pytest.raises(OSError):
            PolicyServer(server.robots, port=server.port)
    with pytest.raises(ConnectionClosed):
        own.infer(SENT)


def test_the_command(tmp_path, capsys):
    """It serves a checkpoint until it is told to stop."""
    of_pictures().save(tmp_path / "checkpoint")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []

    def act():
        for _ in range(200):
            try:
                own = client.WebsocketClientPolicy("127.0.0.1", port)
                break
            except OSError:
                time.sleep(0.05)
        found.append(own.infer(SENT)["actions"].shape)
        os.kill(os.getpid(), signal.SIGTERM)

    thread, before = threading.Thread(target=act), signal.getsignal(signal.SIGTERM)
    thread.start()
    options = f"--checkpoint {tmp_path / 'checkpoint'} --port {port} --robots 2 --set steps=1 --set chunk_size=1"
    assert main(["serve", *options.split()]) == 0
    thread.join()
    assert found == [(2, 2)] and signal.getsignal(signal.SIGTERM) is before
    printed = capsys.readouterr().out
    assert main(["serve", "--checkpoint", str(tmp_path), "--port", "70000"]) == 2
    assert "--port must be a whole number from 0 to 65535, got 70000" in capsys.readouterr().err
    assert f"ws://127.0.0.1:{port}" in printed and "up to 2" in printed and "observation/top [16, 16, 3]" in printed


@pytest.mark.parametrize(
    "value", [np.arange(6, dtype="<i2").reshape(2, 3), np.float32(1.5), {"a": [1, "b", None, True]}, np.zeros((0, 2))]
)
def test_the_wire_format_is_that_of_the_client(value):
    np.testing.assert_equal(unpack(msgpack_numpy.packb(value)), value)
    assert pack(value) == msgpack_numpy.packb(value)


@pytest.mark.parametrize(
    "damaged",
    [
        {b"__ndarray__": True, b"data": b"", b"dtype": "<f4"},
        {b"__ndarray__": True, b"data": b"12", b"dtype": "<f4", b"shape": [4]},
        {b"__ndarray__": True, b"data": b"12345678", b"dtype": "|O", b"shape": [1]},
        {b"__ndarray__": True, b"data": b"1234", b"dtype": "nothing", b"shape": [1]},
        {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": "x"},
        {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"},
    ],
    ids=str,
)
def test_damaged_arrays(damaged):
    with pytest.raises(ValueError, match="no msgpack as openpi-client packs it"):
        unpack(msgpack.packb(damaged))
    with pytest.raises(ValueError, match="dtypes must be of numbers"):
        pack(np.array([None]))

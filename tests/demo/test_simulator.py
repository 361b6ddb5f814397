"""Adapters of ``wam rollout --simulator``: how fast their robot acts is theirs to say, and the film shows it."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from wam_models import LeRobotDataset, simulator
from wam_models.cli import rollout as rollout_command
from wam_models.evaluate import stream
from wam_models.rollout import RolloutConfig, RolloutEngine
from wam_models.rollout import episode as episode_module
from wam_models.train import train

ADAPTERS = """
import numpy as np

class Box:
    def reset(self): ...
    def step(self, actions): ...

class Slow(Box):
    control_freq = 10

class Stopped(Box):
    control_freq = 0

class Spoken(Box):
    control_freq = "20 Hz"

class Counted(Box):
    control_freq = np.int64(10)

class Flagged(Box):
    control_freq = True

class Endless(Box):
    control_freq = float("nan")

class Huge(Box):
    control_freq = 10**400

class Unasked(Box):
    @property
    def control_freq(self):
        raise RuntimeError("reset first")

class Daily(Box):
    control_freq = 1 / 86_400

def failing():
    raise RuntimeError("no display")
"""


@pytest.fixture
def adapters(tmp_path, monkeypatch) -> Path:
    """A working directory with ``adapters.py``."""
    (tmp_path / "adapters.py").write_text(ADAPTERS)
    monkeypatch.delenv("DISPLAY", raising=False)  # no window
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name, milliseconds", [("Box", 200), ("Slow", 400), ("Counted", 400), ("Daily", 655_350)])
def test_the_film_is_as_fast_as_the_robot(name, milliseconds, adapters, monkeypatch, capsys):
    """Four actions from picture to picture, at 20 actions a second where the adapter does not say."""
    pictures = np.random.default_rng(0).integers(0, 255, (3, 32, 64, 3), np.uint8)
    actions, frames = np.zeros((2, 4, 7), np.float32), np.array([1, 2])
    played = simulator.Played("lift", False, pictures, pictures[::-1], actions, frames, [0.5])
    monkeypatch.setattr(rollout_command, "play", lambda *_, **__: played)
    model = SimpleNamespace(device=torch.device("cpu"), config=SimpleNamespace(actions_per_frame=4))
    args = SimpleNamespace(simulator=f"adapters:{name}", seed=0, chunks=None, out=adapters)
    config = RolloutConfig(program="joint", chunk_size=2)
    policy = SimpleNamespace(model=model, camera=None, cameras={}, frames_are_states=False, actions_per_frame=4)
    assert rollout_command.roll_out_in_simulator(args, policy, config, "joint") == 0
    takes = 4000 // milliseconds or "1.15741e-05"
    assert f"whose robot takes {takes}" in capsys.readouterr().out
    with Image.open(adapters / f"simulated_adapters+{name}_joint_seed0.gif") as film:
        assert film.n_frames == 3 and film.info["duration"] == milliseconds


@pytest.fixture(scope="module")
def policy(data, config):
    return train(replace(config, steps=1), data, progress=False).policy


def play(policy, adapter, chunks=3):
    rng = torch.Generator().manual_seed(0)
    return simulator.play(policy, policy.rollout, adapter, chunks=chunks, generator=rng, progress=False)


class Toy:
    """Pictures that differ from frame to frame, in the ways an adapter may hand them over."""

    def __init__(self, hand_over=lambda pictures: pictures, done=False, count=2):
        self.rng, self.hand_over, self.done, self.count = np.random.default_rng(0), hand_over, done, count
        self.actions = []

    def pictures(self, *frames):
        return self.hand_over(self.rng.integers(0, 255, (*frames, 32, 64, 3), np.uint8))

    def reset(self):
        return self.pictures(), "lift"

    def step(self, actions):
        self.actions.append(actions.copy())
        actions[:] = 0  # an adapter may clip in place
        return self.pictures(self.count), self.done


class OneBuffer(Toy):
    """Every picture in the same memory."""

    def __init__(self):
        super().__init__()
        self.held = np.zeros((2, 32, 64, 3), np.uint8)

    def pictures(self, *frames):
        place = self.held if frames else self.held[0]
        place[:] = super().pictures(*frames)
        return place


def test_what_was_executed_is_kept(policy):
    toy = Toy(count=1)  # of two frames in a chunk
    played = play(policy, toy)
    assert played.actions.shape == (6, 4, 7) and played.frames.tolist() == [1, 2, 2, 3, 3, 4]
    np.testing.assert_array_equal(played.actions.reshape(-1, 7), np.concatenate(toy.actions))
    assert len(played.pictures) == 4 and len(played.imagined) == 7


@pytest.mark.parametrize(
    "adapter",
    [
        OneBuffer(),
        Toy(lambda p: np.ascontiguousarray(p[..., ::-1, ::-1, :])[..., ::-1, ::-1, :]),
        Toy(lambda p: np.asfortranarray(p)),
        Toy(torch.from_numpy),
        Toy(lambda p: torch.from_numpy(p.swapaxes(-1, -2).copy()).swapaxes(-1, -2)),
        Toy(lambda p: list(p)),
        Toy(lambda p: np.frombuffer(p.tobytes(), np.uint8).reshape(p.shape)),
        Toy(done=np.bool_(False)),
        Toy(done=np.array([False])),
        Toy(done=torch.tensor(False)),
        Toy(done=[False]),
    ],
    ids=[
        "one buffer",
        "flipped",
        "Fortran",
        "tensor",
        "strided",
        "list",
        "read-only",
        "bool_",
        "array",
        "bool tensor",
        "list of one",
    ],
)
def test_pictures_may_come_in_any_memory(policy, adapter, recwarn):
    played, plain = play(policy, adapter), play(policy, Toy())
    np.testing.assert_array_equal(played.pictures, plain.pictures)
    np.testing.assert_array_equal(played.actions, plain.actions)
    assert played.done is False and not recwarn.list


class Wrong(Toy):
    """What one method returns in the third call is wrong."""

    def __init__(self, **wrong):
        super().__init__()
        self.wrong, self.calls = wrong, 0

    def reset(self):
        return self.wrong.get("reset", super().reset())

    def step(self, actions):
        self.calls += 1
        returned = self.wrong.get("step", ZeroDivisionError("the arm\nis stuck"))
        if self.calls == 3 and isinstance(returned, Exception):
            raise returned
        return returned if self.calls == 3 else super().step(actions)


PICTURE = np.zeros((32, 64, 3), np.uint8)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"reset": PICTURE[None]}, r"Wrong.reset must return \(picture, instruction\), got a ndarray"),
        ({"reset": (PICTURE, "lift", {})}, r"Wrong.reset must return \(picture, instruction\), got 3 values"),
        ({"reset": ({"image": PICTURE}, "lift")}, r"Wrong.reset must return pictures as uint8 \[H, W, 3\], got object"),
        ({"reset": (PICTURE, {})}, "Wrong.reset must return an instruction that is a string, got {}"),
        ({"reset": (PICTURE / 255, "lift")}, r"Wrong.reset .* uint8 \[H, W, 3\], got float64 \[32, 64, 3\]; colours"),
        ({"reset": (PICTURE.transpose(2, 0, 1), "lift")}, r"Wrong.reset .*got uint8 \[3, 32, 64\]; colours come last"),
        ({"reset": (PICTURE[..., :1], "lift")}, r"Wrong.reset .*got uint8 \[32, 64, 1\]"),
        ({"reset": (PICTURE[:16], "lift")}, "Wrong.reset: pictures are 16 x 64, but the policy was trained on 32 x 64"),
        ({"reset": (PICTURE, "fly")}, "no word of 'fly' is in the vocabulary"),
        ({}, "Wrong.step of chunk 3 raised ZeroDivisionError: the arm\nis stuck; WAM_TRACEBACK=1 shows where"),
        ({"step": None}, r"Wrong.step of chunk 3 must return \(pictures, done\), got a NoneType"),
        ({"step": (PICTURE[None], 0.0, False, False, {})}, r"Wrong.step of chunk 3 .*\(pictures, done\), got 5 values"),
        ({"step": (PICTURE, False)}, r"Wrong.step of chunk 3 .* uint8 \[F, H, W, 3\], got uint8 \[32, 64, 3\]"),
        ({"step": ([PICTURE, PICTURE[1:]], False)}, "Wrong.step of chunk 3 must return pictures of one size"),
        ({"step": (torch.zeros(1, 32, 64, 3).bfloat16(), False)}, "Wrong.step of chunk 3 .* as uint8: .*BFloat16"),
        ({"step": (torch.zeros(1, 32, 64, 3, device="meta"), False)}, "Wrong.step of chunk 3 .* as uint8: .*meta"),
        ({"step": (PICTURE[None], torch.zeros(1, device="meta"))}, "Wrong.step of chunk 3 .* done as a bool: .*meta"),
        ({"step": (PICTURE[None, :, :32], False)}, "Wrong.step of chunk 3: pictures are 32 x 32, but the policy"),
        ({"step": (PICTURE[None], None)}, "Wrong.step of chunk 3 must return done as a bool, got None"),
        ({"step": (PICTURE[None], 1.0)}, "Wrong.step of chunk 3 must return done as a bool, got 1.0"),
        ({"step": (PICTURE[None], np.zeros(2, bool))}, "Wrong.step of chunk 3 must return done as a bool, got array"),
        (
            {"step": (np.stack([PICTURE] * 3), False)},
            "Wrong.step of chunk 3 must return at most 2 pictures for 8 actions",
        ),
    ],
)
def test_a_wrong_adapter_is_named_with_its_chunk(policy, wrong, message):
    with pytest.raises(ValueError, match=message):
        play(policy, Wrong(**wrong))


def test_an_older_checkpoint_does_not_know_the_picture_size(policy):
    with pytest.raises(
        ValueError, match=r"chunk 3 must return pictures as reset does, \[32, 64, 3\], got \[32, 32, 3\]"
    ):
        play(replace(policy, camera=None), Wrong(step=(PICTURE[None, :, :32], False)))


@pytest.mark.parametrize("ended", [[], np.empty((0, 32, 64, 3), np.uint8), torch.empty(0)])
def test_an_episode_may_end_without_a_picture(policy, ended):
    played = play(policy, Wrong(step=(ended, False)))
    assert len(played.pictures) == 5 and len(played.actions) == 6 and len(played.chunk_seconds) == 3


def test_no_robot_gets_actions_that_are_not_finite(policy, root, monkeypatch):
    """Nor does an evaluation compare them; neither on a GPU, where an episode does not look."""
    broken = deepcopy(policy)
    toy = Toy()
    with torch.no_grad():
        broken.model.action_expert.action_proj_out.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"propose: \w+ of the chunk at frames \[1\] must be finite"):
        play(broken, toy)
    monkeypatch.setattr(episode_module, "check_finite", lambda *args, **options: None)
    with pytest.raises(ValueError, match="play: chunk 1: actions are not finite and must not be executed"):
        play(broken, toy)
    assert not toy.actions
    clip = broken.clip(LeRobotDataset(root), 0)
    chunks = stream(
        RolloutEngine(broken.model, broken.rollout), clip["video"], clip["action"], broken.text([clip["text"]]),
        objective="joint", generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with pytest.raises(ValueError, match="predicted action of the chunk at frame 1 is not finite"):
        next(chunks)


def test_a_codec_of_whole_videos_cannot_act(policy):
    codec = SimpleNamespace(channels=policy.codec.channels, spatial=16, temporal=4)
    with pytest.raises(ValueError, match="a SimpleNamespace takes 4 for each latent frame, and a simulator gives one"):
        play(replace(policy, codec=codec), Toy())


@pytest.mark.parametrize(
    "name, got",
    [
        ("Stopped", "must be actions a second, a positive number, got 0"),
        ("Spoken", "must be actions a second, a positive number, got '20 Hz'"),
        ("Endless", "must be actions a second, a positive number, got nan"),
        ("Flagged", "must be actions a second, a positive number, got True"),
        ("Huge", "must be actions a second, a positive number, got 1000"),
        ("Unasked", "raised RuntimeError: reset first"),
    ],
)
def test_what_is_no_frequency_is_refused(name, got, adapters):
    with pytest.raises(ValueError, match=f"control_freq {got}"):
        simulator.load(f"adapters:{name}")


def test_a_factory_that_fails_is_named(adapters):
    with pytest.raises(ValueError, match="--simulator adapters:failing cannot be loaded: RuntimeError: no display"):
        simulator.load("adapters:failing")

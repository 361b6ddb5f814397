"""Tuned launch choices: what a file says wins, its absence warns once, and a wrong file is refused by name."""

import json
import warnings
from dataclasses import dataclass

import pytest
import torch

from wam_kernels.runtime import tuning


@dataclass(frozen=True)
class Options:
    num_warps: int
    num_stages: int


@pytest.fixture
def op(monkeypatch):
    monkeypatch.setattr(tuning, "TUNABLE", {})

    @tuning.tuned("some_op.forward")
    def forward(D: int, itemsize: int = 2) -> Options:
        """Doc."""
        return Options(num_warps=4 if D <= 128 else 8, num_stages=2)

    return forward


@pytest.fixture
def h100(monkeypatch, tmp_path):
    """A machine that has one; returns a function that writes its file."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.recorded_choice.cache_clear()
    tuning.warn_once.cache_clear()
    yield lambda text: (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text(text)
    tuning.recorded_choice.cache_clear()
    tuning.warn_once.cache_clear()


def choices(choice: object) -> str:
    return json.dumps({"device": "x", "choices": {"some_op.forward": {"D=64 itemsize=2": {"choice": choice}}}})


def test_without_cuda_the_default_and_no_word(op):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op(64) == Options(4, 2) and op(256, itemsize=4) == Options(8, 2)
    assert op.__doc__ == "Doc." and tuning.TUNABLE == {"some_op.forward": op}


def test_a_recorded_choice_is_laid_over_the_default(op, h100):
    h100(choices({"num_stages": 3}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op(64) == op(D=64, itemsize=2) == Options(4, 3)


def test_null_is_the_default_and_known(op, h100):
    h100(choices(None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op(64) == Options(4, 2)


def test_no_file_warns_once_and_takes_the_default(op, h100):
    with pytest.warns(UserWarning, match="no tuned launch choices for 'NVIDIA H100 80GB HBM3'.*wam bench tune") as seen:
        assert op(64) == Options(4, 2) and op(128) == Options(4, 2)
    assert len(seen) == 1


def test_no_entry_warns_and_takes_the_default(op, h100):
    h100(choices({"num_stages": 3}))
    with pytest.warns(UserWarning, match=r"some_op.forward with D=128 itemsize=2"):
        assert op(128) == Options(4, 2)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "must hold launch choices"),
        ("[]", "must hold launch choices"),
        (choices({"num_wraps": 4}), r"fields \['num_warps', 'num_stages'\], got {'num_wraps': 4}"),
        (choices(4), "must be an object"),
        (choices({"num_warps": 4.0}), "must have whole numbers of at least 1, got {'num_warps': 4.0}"),
        ('{"choices": [4]}', "must hold launch choices"),
        ('{"choices": {"some_op.forward": {"D=64 itemsize=2": 4}}}', "must hold launch choices"),
    ],
)
def test_a_wrong_file_is_refused(op, h100, text, message):
    h100(text)
    with pytest.raises(ValueError, match=message):
        op(64)


def test_a_number(h100, monkeypatch):
    monkeypatch.setattr(tuning, "TUNABLE", {})
    warps = tuning.tuned("some_op.forward")(lambda D, itemsize: 2)
    h100(choices(16))
    assert warps(64, 2) == 16
    with tuning.trying("some_op.forward", {"num_warps": 1}), pytest.raises(ValueError, match="must be a whole number"):
        warps(64, 2)


def test_trials_win_and_end(op, h100):
    h100(choices({"num_stages": 3}))
    with pytest.raises(RuntimeError), tuning.trying("some_op.forward", {"num_warps": 1}):
        assert op(64) == Options(1, 2) and op(999) == Options(1, 2)
        raise RuntimeError
    assert op(64) == Options(4, 3)


def test_files_in_the_package_belong_to_their_device():
    for path in tuning.FOLDER.glob("*.json"):
        assert path == tuning.path_of(json.loads(path.read_text())["device"])

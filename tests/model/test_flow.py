"""Noise levels and their draws."""

import pytest
import torch

from wam_models.flow import COUPLINGS, SHIFTS, TimestepDraw, add_noise, sigmas, target, timesteps
from wam_models.train.step import noised_video


def test_schedule_values():
    assert sigmas(4, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25]
    torch.testing.assert_close(sigmas(3, 5.0), torch.tensor([1.0, 10 / 11, 5 / 7]))  # 5s / (1 + 4s) of 1, 2/3, 1/3
    assert timesteps(sigmas(2, 1.0)).tolist() == [1000.0, 500.0]
    grid = sigmas(1000, 5.0)
    assert len(grid) == 1000 and (grid.diff() < 0).all() and grid[-1] > 0
    for bad in ((0, 1.0), (1.5, 1.0), (3, 0.0), (3, float("nan"))):
        with pytest.raises(ValueError, match="sigmas: (steps|shift) must be"):
            sigmas(*bad)
    for shift in SHIFTS:
        levels = sigmas(1000, shift)
        assert (levels.diff() < 0).all() and levels[0].item() == pytest.approx(1, rel=1e-4) and levels[-1] > 0


def test_euler_steps_along_the_true_flow_arrive_at_the_data():
    x, noise = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    grid = [*sigmas(7, 5.0).tolist(), 0.0]
    now = noise
    for s, after in zip(grid, grid[1:], strict=False):
        torch.testing.assert_close(now, add_noise(x, noise, torch.full((2, 3), s)), rtol=0, atol=1e-5)
        now = now + target(x, noise) * (after - s)
    torch.testing.assert_close(now, x, rtol=0, atol=1e-5)


def test_each_frame_has_its_own_noise_level():
    video, noise = torch.zeros(1, 2, 3, 2, 2), torch.ones(1, 2, 3, 2, 2)
    out = noised_video(video, noise, torch.tensor([[0.0, 0.5, 1.0]]))
    assert out[0, :, :, 0, 0].tolist() == [[0.0, 0.5, 1.0]] * 2


def draw(coupling, n=4000):
    return TimestepDraw(coupling=coupling).sigmas(n, 2, torch.Generator().manual_seed(0))


def test_couplings():
    video, action = draw("independent")
    assert abs(torch.corrcoef(torch.stack([video.flatten(), action.flatten()]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([video[:, 0], video[:, 1]]))[0, 1]) < 0.05  # one draw a frame
    assert abs(action.mean() - 0.5) < 0.02  # shift 1 is uniform
    assert video.mean() > 0.7  # shift 5 is nearer to noise
    video, action = draw("shared_index")
    torch.testing.assert_close(video, 5 * action / (1 + 4 * action))
    video, action = draw("shared_video_schedule")
    assert torch.equal(video, action)
    video, action = draw("matched_sigma")
    assert (video - action).abs().max() <= 0.5 / 1000 + 1e-6 and not torch.equal(video, action)
    video, action = draw("asynchronous")
    clean = (action == 0).all(1)
    assert (action[~clean] > 0).all() and abs(clean.float().mean() - 0.5) < 0.03
    before = video / (5 - 4 * video)  # its shift
    assert (before[~clean] >= action[~clean] - 1e-6).all()
    above = (before[~clean] - action[~clean]) / (1 - action[~clean]).clamp(min=1e-6)
    assert abs(above[action[~clean] < 0.9].mean() - 0.6) < 0.02  # of Beta(1.5, 1)
    torch.testing.assert_close(video[clean], draw("independent")[0][clean])
    video_draws = [draw(coupling, 3)[0] for coupling in COUPLINGS if coupling != "asynchronous"]
    assert all(torch.equal(video_draws[0], v) for v in video_draws)
    with pytest.raises(ValueError, match="coupling must be one of"):
        TimestepDraw(coupling="magic")


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_one_level_for_all_frames_of_a_clip(coupling):
    """That of its first frame where each has its own, so other draws stay as they are."""
    each, one = (
        TimestepDraw(per=per, coupling=coupling).sigmas(50, 3, torch.Generator().manual_seed(0))
        for per in ("frame", "clip")
    )
    for levels, of_clip in zip(each, one, strict=True):
        assert torch.equal(of_clip, levels[:, :1].expand(-1, 3)) and of_clip.unique().numel() > 20
    with pytest.raises(ValueError, match="per must be one of"):
        TimestepDraw(per="chunk")


def test_history_is_noised_for_half_of_the_samples_at_the_low_half():
    sigma = TimestepDraw().history_sigmas(4000, 3, 0.5, torch.Generator().manual_seed(0))
    noised = (sigma > 0).any(1)
    assert abs(noised.float().mean() - 0.5) < 0.03
    assert (sigma[noised] > 0).all()  # every frame of a noised sample, each at its own level
    assert sigma.max() <= sigmas(1000, 5.0)[500] and not torch.equal(sigma[noised][:, 0], sigma[noised][:, 1])
    assert not TimestepDraw().history_sigmas(50, 3, 0.0, torch.Generator().manual_seed(0)).any()

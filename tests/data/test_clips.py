"""Clips: which frames and actions are cut, in which units."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data import tiny
from wam_models.data import ClipDataset, LeRobotDataset, PatchPCA
from wam_models.data.clips import episode_frames


@pytest.fixture(scope="module")
def clips(shared_tiny_root):
    return ClipDataset(LeRobotDataset(shared_tiny_root), progress=list)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_layout(clips):
    assert clips.tasks == ["lift", "push"]
    assert clips.train == [0, 1, 2]
    assert clips.held_out == [3]
    assert clips.latent_shape == (48, 2, 4)
    # latent frames 0, 4, 8, ..: the last one needs its video frame to exist
    assert [clips.length(i) for i in range(4)] == [6, 5, 5, 5]


def test_sample_shapes_and_dtypes(clips):
    batch = clips.sample(5, 3, generator())
    assert batch["video"].shape == (5, 48, 3, 2, 4)
    assert batch["action"].shape == (5, 3, 4, 7)
    assert batch["video"].dtype == batch["action"].dtype == torch.float32
    assert batch["task"].shape == (5,)
    assert batch["task"].dtype == torch.int64


def test_actions_lead_to_their_frame(clips):
    """Slot i of latent frame f is action 4 (f - 1) + i of the episode; the first frame of a clip has none."""
    batch = clips.sample(40, 3, generator())
    place = clips.denormalize_action(batch["action"])[..., 0]
    for row in range(40):
        start = 100 * int(batch["episode"][row]) + 4 * int(batch["start"][row])
        expected = start + torch.arange(8.0).view(2, 4)
        torch.testing.assert_close(place[row, 1:], expected, atol=1e-3, rtol=0)
    assert not batch["action"][:, 0].any()
    assert len(set(batch["start"].tolist())) > 1


def test_video_is_every_fourth_frame(clips, shared_tiny_root):
    reader = LeRobotDataset(shared_tiny_root)
    batch = clips.sample(6, 2, generator())
    for row in range(6):
        episode, start = int(batch["episode"][row]), 4 * int(batch["start"][row])
        frames = reader.frames(episode)[[start, start + 4]]
        torch.testing.assert_close(batch["video"][row], clips.codec.encode(frames))


def test_task_follows_the_episode(clips):
    batch = clips.sample(40, 2, generator())
    assert [clips.tasks[t] for t in batch["task"]] == [tiny.TASKS[e] for e in batch["episode"]]


def test_whole_episode(clips):
    whole = clips.episode(3)
    assert whole["video"].shape == (1, 48, 5, 2, 4)
    assert whole["action"].shape == (1, 5, 4, 7)
    actions = clips.denormalize_action(whole["action"])[0, 1:].reshape(-1, 7)
    np.testing.assert_allclose(actions.numpy(), tiny.actions(3)[:16], atol=1e-4)
    assert clips.tasks[int(whole["task"])] == "push"


def test_held_out_is_never_drawn_for_training(clips):
    for seed in range(20):
        assert 3 not in clips.sample(32, 2, generator(seed))["episode"]
    assert set(clips.sample(32, 2, generator(), split="held_out")["episode"].tolist()) == {3}


def test_held_out_shapes_no_statistic(clips, tiny_root):
    """Moving one episode from training to held out must change the statistics; what lies in held out must not."""
    known = np.concatenate([tiny.actions(i) for i in (0, 1, 2)]).astype(np.float64)
    np.testing.assert_allclose(clips.action_mean.numpy(), known.mean(0), rtol=1e-5, atol=1e-6)
    reader = LeRobotDataset(tiny_root)
    frames = np.concatenate([reader.frames(i, every=4) for i in (0, 1, 2)])
    expected = PatchPCA.fit(frames).state_dict()
    for key, value in clips.codec.state_dict().items():
        assert torch.equal(value, expected[key])


def test_constant_dimensions(clips):
    assert clips.constant_actions.tolist() == [False, False, False, True, True, True, False]
    assert (clips.action_std[3:6] == 1).all()
    values = torch.cat([clips.episode(i)["action"][0, 1:].reshape(-1, 7) for i in clips.train])
    assert values.isfinite().all()
    assert not values[:, 3:6].any()
    raw = torch.randn(3, 7)
    torch.testing.assert_close(clips.denormalize_action(clips.normalize_action(raw)), raw, atol=1e-4, rtol=0)


def test_sampling_is_deterministic(clips):
    a, b, c = (clips.sample(8, 3, generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_every_clip_can_be_drawn(clips):
    batch = clips.sample(500, 4, generator())
    seen = set(zip(batch["episode"].tolist(), batch["start"].tolist(), strict=True))
    assert seen == {(i, s) for i in clips.train for s in range(clips.length(i) - 3)}


def test_longest_clip(clips):
    batch = clips.sample(3, 6, generator())
    assert batch["episode"].tolist() == [0, 0, 0]
    assert batch["start"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="frames is 7, but the longest train episode has 6"):
        clips.sample(1, 7, generator())


def test_clips_do_not_share_memory(clips):
    before = clips.episode(0)
    for key in ("video", "action"):
        clips.sample(2, 3, generator())[key].fill_(99)
        clips.episode(0)[key].fill_(99)
        assert torch.equal(clips.episode(0)[key], before[key])


def test_refusals(clips, tiny_root):
    with pytest.raises(ValueError, match="split must be one of .* got 'test'"):
        clips.sample(1, 2, generator(), split="test")
    for batch in (0, 1.5):
        with pytest.raises(ValueError, match=f"batch must be a whole number of at least 1, got {batch}"):
            clips.sample(batch, 2, generator())
    with pytest.raises(ValueError, match="index must be a whole number of at least 0, got '1'"):
        clips.episode("1")
    with pytest.raises(IndexError, match="episode 9"):
        clips.episode(9)
    path = tiny_root / "meta/info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "splits": {"test": "0:4"}}))
    with pytest.raises(ValueError, match='no episode in "train"'):
        ClipDataset(tiny_root)
    feature = {**info["features"][tiny.KEY], "shape": [30, 64, 3]}
    path.write_text(json.dumps({**info, "features": {**info["features"], tiny.KEY: feature}}))
    with pytest.raises(ValueError, match=rf"info.json: pictures of {tiny.KEY} are 30 x 64, expected multiples of 16"):
        ClipDataset(tiny_root)


def test_one_bad_action_is_named(tiny_root):
    """Before any video is decoded, whichever split the episode is of."""
    path = tiny_root / "data/chunk-000/file-001.parquet"
    table = pq.read_table(path)
    values = table["action"].to_pylist()
    values[25][6] = float("nan")
    (tiny_root / f"videos/{tiny.KEY}/chunk-000/file-000.mp4").unlink()
    pq.write_table(table.set_column(0, "action", pa.array(values, table["action"].type)), path)
    with pytest.raises(ValueError, match=r"file-001.parquet: action of episode 3 is nan in row 25 \(its frame 5\)"):
        ClipDataset(tiny_root)


def test_actions_of_several_widths(tiny_root):
    info = json.loads((tiny_root / "meta/info.json").read_text())
    del info["features"]["action"]["shape"]
    (tiny_root / "meta/info.json").write_text(json.dumps(info))
    path = tiny_root / "data/chunk-000/file-001.parquet"
    table = pq.read_table(path)
    values = [row[:6] for row in table["action"].to_pylist()]
    pq.write_table(table.set_column(0, "action", pa.array(values)), path)
    with pytest.raises(ValueError, match="action of episode 2 has 6 numbers, of episode 0 7"):
        ClipDataset(tiny_root)


def test_an_episode_of_one_frame(tiny_root):
    """It has one latent frame and no action; clips of more are drawn from the others."""
    path = tiny_root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    row = {**table.to_pylist()[1], "length": 1, f"videos/{tiny.KEY}/to_timestamp": 1.2}
    rows = [row if row["episode_index"] == r["episode_index"] else r for r in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    path = tiny_root / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).slice(0, tiny.LENGTHS[0] + 1), path)
    for codec in (None, FourFrames()):
        short = ClipDataset(tiny_root, codec=codec)
        assert short.length(1) == 1 and not short.episode(1)["action"].any()
        assert 1 not in short.sample(50, 2, generator())["episode"]


class FourFrames:
    """Stands for a codec that compresses time, as Wan's VAE does."""

    channels, spatial, temporal = 1, 16, 4

    def encode(self, frames):
        assert len(frames) % 4 == 1
        picture = torch.from_numpy(frames[::4]).float().mean(-1)
        return torch.nn.functional.avg_pool2d(picture, 16)[None]


def test_codec_that_compresses_time(shared_tiny_root, clips):
    other = ClipDataset(shared_tiny_root, codec=FourFrames())
    assert [other.length(i) for i in range(4)] == [clips.length(i) for i in range(4)]
    assert other.episode(0)["video"].shape == (1, 1, 6, 2, 4)
    assert torch.equal(other.episode(0)["action"], clips.episode(0)["action"])
    frames = episode_frames(LeRobotDataset(shared_tiny_root), 0, FourFrames())
    assert torch.equal(FourFrames().encode(frames), other.episode(0)["video"][0])
    thrice = FourFrames()
    thrice.temporal = 3
    with pytest.raises(ValueError, match="codec.temporal is 3, expected a divisor of 4"):
        ClipDataset(shared_tiny_root, codec=thrice)

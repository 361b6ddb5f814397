"""Latents and text on disk: those that a training would compute, whoever wrote them, however often they were killed."""

import importlib.util
import json
import shutil

import pytest
import torch

from tests.data import tiny
from wam_models import cli
from wam_models.data import ClipDataset, LeRobotDataset, PatchPCA, wan_vae_codec
from wam_models.data import encoded as module
from wam_models.data.encoded import EncodedLatents, encode_dataset, encode_texts, read_texts

needs_diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("encoded") / "tiny")


@pytest.fixture(scope="module")
def direct(root):
    """Clips encoded when they are read, by a codec of small cells."""
    return ClipDataset(root, channels=8, cell=8)


def same_clips(a, b):
    assert len(a) == len(b) and a.latent_shape == b.latent_shape
    for i in range(len(a)):
        assert all(torch.equal(value, b.episode(i)[name]) for name, value in a.episode(i).items())
    ours, theirs = (d.sample(3, 4, torch.Generator().manual_seed(1)) for d in (a, b))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_encoded_equals_on_the_fly(root, direct, tmp_path):
    dataset = LeRobotDataset(root)
    done = [encode_dataset(dataset, direct.codec, tmp_path, actions_per_frame=4, part=i, parts=3) for i in (1, 0, 2)]
    assert done == [(1, 0), (2, 0), (1, 0)]  # whatever the order of the processes
    same_clips(direct, ClipDataset(root, latents=EncodedLatents(tmp_path)))
    assert encode_dataset(dataset, direct.codec, tmp_path, actions_per_frame=4) == (0, 4)


def test_a_killed_run_goes_on(root, direct, tmp_path, monkeypatch):
    new_file, entries = module.new_file, []

    def killed(path):
        entries.extend([path] if path.parent.name == "episodes" else [])
        if len(entries) == 3:  # of the third episode the object is there, its entry is not
            raise KeyboardInterrupt
        return new_file(path)

    monkeypatch.setattr(module, "new_file", killed)
    dataset = LeRobotDataset(root)
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(dataset, direct.codec, tmp_path, actions_per_frame=4)
    with pytest.raises(ValueError, match="episode 2 is not encoded yet; run wam encode again"):
        ClipDataset(root, latents=EncodedLatents(tmp_path))
    monkeypatch.undo()
    (tmp_path / "objects/zz").mkdir()
    (tmp_path / "objects/zz/part.17.half.npy").write_bytes(b"half")  # what a kill leaves
    encoded = []
    monkeypatch.setattr(
        direct.codec, "encode", lambda f, e=direct.codec.encode: encoded.append(1) or e(f), raising=False
    )
    assert encode_dataset(dataset, direct.codec, tmp_path, actions_per_frame=4) == (2, 2)
    monkeypatch.undo()
    same_clips(direct, ClipDataset(root, latents=EncodedLatents(tmp_path)))


def test_what_does_not_belong_together_is_refused(root, direct, tmp_path):
    dataset, out = LeRobotDataset(root), tmp_path / "out"
    encode_dataset(dataset, direct.codec, out, actions_per_frame=4)
    other = PatchPCA.fit(dataset.frames(0), 8, 8)
    with pytest.raises(ValueError, match="holds latents of another codec"):
        encode_dataset(dataset, other, out, actions_per_frame=4)
    with pytest.raises(ValueError, match="encoded with actions_per_frame 4, but .* with 8"):
        ClipDataset(root, latents=EncodedLatents(out), actions_per_frame=8)
    with pytest.raises(ValueError, match="by another codec than the policy's"):
        ClipDataset(root, other, latents=EncodedLatents(out))
    changed = shutil.copytree(root, tmp_path / "changed")
    info = json.loads((changed / "meta/info.json").read_text())
    (changed / "meta/info.json").write_text(json.dumps(info | {"robot_type": "other"}))
    with pytest.raises(ValueError, match="was encoded with files"):
        ClipDataset(changed, latents=EncodedLatents(out))
    with pytest.raises(ValueError, match="encoded.json: not found"):
        EncodedLatents(tmp_path / "none")
    path = next((out / "objects").rglob("*.npy"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read .* remove it and run wam encode again"):
        held = ClipDataset(root, latents=EncodedLatents(out))
        [held.episode(i) for i in range(4)]


def test_texts_are_kept_by_content(tmp_path):
    asked = []

    def encoder(texts):
        asked.extend(texts)
        return torch.stack([torch.full((3, 2), float(len(t))) for t in texts])

    assert encode_texts(["lift", "push it", "lift"], encoder, "one", tmp_path) == 2
    assert encode_texts(["lift", "turn"], encoder, "one", tmp_path) == 1 and asked == ["lift", "push it", "turn"]
    found = read_texts(["turn", "push it"], tmp_path)
    assert torch.equal(found["push it"], torch.full((3, 2), 7.0)) and list(found) == ["turn", "push it"]
    with pytest.raises(ValueError, match="'open' is not encoded yet"):
        read_texts(["open"], tmp_path)
    with pytest.raises(ValueError, match="holds texts of another encoder"):
        encode_texts(["lift"], encoder, "another", tmp_path)
    for damage, message in (("{}", "texts.json: must hold made_by"), (None, "texts.json: not found")):
        (tmp_path / "texts.json").write_text(damage) if damage else (tmp_path / "texts.json").unlink()
        with pytest.raises(ValueError, match=message):
            read_texts(["lift"], tmp_path)


@pytest.mark.slow
@needs_diffusers
def test_the_command_encodes_with_wans_vae_and_trains_on_it(root, tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    tiny.wan_vae([0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]).save_pretrained(tmp_path / "vae")
    flags = ["encode", "--data", str(root), "--vae", str(tmp_path / "vae"), "--out", str(tmp_path / "out")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(flags) == 0
        assert "2 episodes encoded" in capsys.readouterr().out
    same_clips(
        ClipDataset(root, wan_vae_codec(tmp_path / "vae")), ClipDataset(root, latents=EncodedLatents(tmp_path / "out"))
    )
    for more, message in (([], "--vae or --text must be given"), (["--vae", "x"], "x/config.json: not found")):
        assert cli.main(["encode", "--data", str(root), "--out", str(tmp_path / "out"), *more]) == 2
        assert message in capsys.readouterr().err

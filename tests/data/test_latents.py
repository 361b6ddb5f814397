"""Codecs: encoding and decoding pictures, fitting, saving, and Wan's VAE."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.data import tiny
from wam_models.data import PatchPCA, psnr, wan_vae_codec


@pytest.fixture(scope="module")
def frames():
    noise = np.random.default_rng(0).integers(-9, 10, (sum(tiny.LENGTHS[:2]), 32, 64, 3))
    return np.clip(np.concatenate([tiny.frames(0), tiny.frames(1)]) + noise, 0, 255).astype(np.uint8)


def patches(frames, p):
    t, h, w, _ = frames.shape
    return frames.reshape(t, h // p, p, w // p, p, 3).swapaxes(2, 3).reshape(-1, 3 * p * p).astype(np.float64) / 255


@pytest.mark.parametrize(("patch", "channels"), [(16, 48), (8, 12)])
def test_reconstruction_is_optimal(frames, patch, channels):
    """No rank-C linear code has a smaller squared error than the truncated SVD, and this one reaches it."""
    pca = PatchPCA.fit(frames, channels=channels, patch=patch)
    rows = patches(frames, patch)
    singular = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    best = np.square(singular[channels:]).sum() / rows.size
    latents = pca.encode(frames)
    # before rounding to uint8
    z = (latents.permute(1, 2, 3, 0) / pca.scale).reshape(-1, channels).double()
    got = np.square((z @ pca.basis.double() + pca.mean.double()).numpy() - rows).mean()
    assert got == pytest.approx(best, rel=1e-4)
    # rounding to whole grey levels adds at most 1/12 of a level squared, clipping nothing
    assert psnr(pca.decode(latents), frames) > 10 * math.log10(1 / (best + 1 / 12 / 255**2)) - 0.1


def test_shapes_and_order(frames):
    pca = PatchPCA.fit(frames, channels=5, patch=8)
    latents = pca.encode(frames[:3])
    assert latents.shape == (5, 3, 4, 8)
    assert latents.dtype == torch.float32
    assert latents.is_contiguous()
    # one patch alone has the latent of its place
    torch.testing.assert_close(latents[:, 1:2, 1:2, 2:3], pca.encode(frames[1:2, 8:16, 16:24]))
    assert pca.decode(latents).shape == (3, 32, 64, 3)


def test_frames_may_lie_in_any_memory(frames):
    pca = PatchPCA.fit(frames, channels=5, patch=8)
    turned, expected = frames[:3, ::-1, ::-1], pca.encode(frames[:3, ::-1, ::-1].copy())
    tensor = torch.from_numpy(turned.transpose(0, 3, 1, 2).copy()).permute(0, 2, 3, 1)  # channels first in memory
    for given in (turned, np.asfortranarray(turned), tensor):
        assert torch.equal(pca.encode(given), expected)
    assert torch.equal(PatchPCA.fit(frames[::-1], channels=5, patch=8).mean, pca.mean)


def test_latents_are_centred_and_scaled(frames):
    latents = PatchPCA.fit(frames).encode(frames).double().flatten(1)
    assert latents.mean(1).abs().max() < 1e-4
    variance = latents.var(1, correction=0)
    assert variance.mean() == pytest.approx(1, rel=0.02)
    assert (variance.diff() <= 1e-6).all()


def test_fit_is_deterministic(frames):
    a, b = PatchPCA.fit(frames, patch=8), PatchPCA.fit(torch.from_numpy(frames.copy()), patch=8)
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key])
    assert (a.basis.gather(1, a.basis.abs().argmax(1, keepdim=True)) > 0).all()


def test_state_survives_safetensors(frames, tmp_path):
    pca = PatchPCA.fit(frames, patch=8)
    save_file(pca.state_dict(), tmp_path / "pca.safetensors")
    again = PatchPCA.from_state_dict(load_file(tmp_path / "pca.safetensors"))
    assert torch.equal(again.encode(frames), pca.encode(frames))
    np.testing.assert_array_equal(again.decode(pca.encode(frames)), pca.decode(pca.encode(frames)))
    assert (again.channels, again.spatial, again.temporal) == (48, 8, 1)


def test_fewer_patches_than_channels():
    one = tiny.frames(0)[:1]  # 32 patches
    pca = PatchPCA.fit(one, patch=8)
    latents = pca.encode(one)
    assert latents.isfinite().all()
    assert psnr(pca.decode(latents), one) > 50


def test_refusals(frames):
    with pytest.raises(ValueError, match="multiples of 16"):
        PatchPCA.fit(frames[:, :30])
    with pytest.raises(ValueError, match="channels is 0"):
        PatchPCA.fit(frames, channels=0)
    with pytest.raises(ValueError, match="expected uint8"):
        PatchPCA.fit(frames.astype(np.float32))
    with pytest.raises(ValueError, match="expected uint8"):
        PatchPCA.fit(frames[:0])
    with pytest.raises(ValueError, match="all patches are equal"):
        PatchPCA.fit(np.full((2, 16, 16, 3), 128, np.uint8))
    pca = PatchPCA.fit(frames, channels=4, patch=8)
    with pytest.raises(ValueError, match=r"expected \[4, T, h, w\]"):
        pca.decode(torch.zeros(5, 1, 2, 2))
    state = pca.state_dict()
    with pytest.raises(ValueError, match="keys are"):
        PatchPCA.from_state_dict({k: v for k, v in state.items() if k != "scale"})
    with pytest.raises(ValueError, match="do not fit"):
        PatchPCA.from_state_dict({**state, "scale": state["scale"][:2]})


def test_psnr():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 255) == 0
    assert psnr(a, a + 1) == pytest.approx(20 * math.log10(255))
    with pytest.raises(ValueError, match="shapes differ"):
        psnr(a, a[:1])


def test_wan_vae_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        wan_vae_codec(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no weights"):
        wan_vae_codec(tmp_path)


def test_wan_vae_round_trip(tmp_path):
    """A tiny VAE with random weights: shapes, and that both directions undo each other's normalisation."""
    pytest.importorskip("diffusers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]
    vae = tiny.wan_vae(mean, std)
    vae.save_pretrained(tmp_path)
    codec = wan_vae_codec(tmp_path)
    assert (codec.channels, codec.spatial, codec.temporal) == (4, 8, 4)
    video = tiny.frames(0)[:9]
    latents = codec.encode(video)
    assert latents.shape == (4, 3, 4, 8)
    assert latents.dtype == torch.float32
    pixels = torch.from_numpy(video).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
    raw = vae.eval().encode(pixels).latent_dist.mode()[0]
    torch.testing.assert_close(latents[0] * 1.5 + 0.1, raw[0].detach(), atol=1e-4, rtol=1e-4)
    assert codec.decode(latents).shape == video.shape
    with pytest.raises(ValueError, match=r"expected 1 \+ 4 k"):
        codec.encode(video[:8])

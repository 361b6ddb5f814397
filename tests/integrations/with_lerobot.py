"""The policies of lerobot 0.6.1 themselves, tiny and with random weights, patched: `make test-lerobot`.

Not collected by `make test`, whose environment cannot have lerobot. Policies come from its ``make_policy``. What would
be downloaded is made small here: Wan's VAE and the text encoder are the real classes, the tokenizer is a stub, and pi-0
gets small Gemmas and a small SigLIP. LingBot-VA trains with flex attention, which has no backward on a CPU and rounds
to bfloat16: here it is a dense softmax in float32 under the block mask that the model makes.
"""

from collections.abc import Callable
from types import SimpleNamespace

import lerobot
import pytest
import torch
from diffusers import AutoencoderKLWan
from lerobot.policies.factory import make_policy, make_policy_config
from lerobot.policies.fastwam import modeling_fastwam
from lerobot.policies.fastwam.wan.adapters import WanVideoVAE38
from lerobot.policies.fastwam.wan.components import WanTextEncoder
from lerobot.policies.lingbot_va import modeling_lingbot_va
from lerobot.policies.lingbot_va import utils as lingbot_utils
from lerobot.policies.lingbot_va.utils import FlexAttnFunc
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import flex_attention
from transformers import UMT5Config, UMT5EncoderModel

from tests.integrations.checks import every_attribute
from wam_kernels.integrations import Patch, _kernels, accelerate, patch, unpatch

SIDE, ACTIONS, STATES, TEXT, PROMPT = 32, 7, 8, 16, "pick up the cup"
CAMERAS = ("observation.images.image", "observation.images.image2")
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


# ---- what would be downloaded ----


def tokenizer(prompts, max_length: int = TEXT, **kwargs):
    """Ids of a prompt's letters, and its mask."""
    ids = torch.zeros(len(prompts), max_length, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        letters = torch.tensor([ord(c) for c in prompt[:max_length]], dtype=torch.long)
        row[: len(letters)] = letters
    return SimpleNamespace(input_ids=ids, attention_mask=(ids > 0).long())


def text_encoder() -> UMT5EncoderModel:
    sizes = {"vocab_size": 128, "d_model": TEXT, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return UMT5EncoderModel(UMT5Config(**sizes)).eval()


def vae() -> AutoencoderKLWan:
    """Wan 2.2's: 16 pixels and 4 frames a latent, 48 channels."""
    sizes = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 48, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    layout = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True}
    scales = {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    temporal = {"temperal_downsample": [False, True, True], "scale_factor_temporal": 4, "scale_factor_spatial": 16}
    return AutoencoderKLWan(**sizes, **layout, **scales, **temporal).eval()


def dense_flex(self, query, key, value, dtype=torch.bfloat16):
    """In the place of ``FlexAttnFunc.forward``: the real block mask, dense and in float32."""
    q, k, v = (t[0].transpose(0, 1)[None] for t in (query, key, value))
    block_mask = FlexAttnFunc.cross_attention_mask if self.is_cross else FlexAttnFunc.attention_mask
    at = [torch.arange(t.shape[2]) for t in (q, k)]
    zero = torch.zeros((), dtype=torch.long)
    mask = block_mask.mask_mod(zero, zero, at[0][:, None], at[1][None])
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num()  # padding attends to nothing
    return (weights @ v).transpose(1, 2)


class TorchInFloat32:
    """``torch`` for LingBot-VA's module, which rounds what it trains on to bfloat16."""

    bfloat16 = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


def small_paligemma(config) -> nn.Module:
    """pi-0 sets the sizes of its Gemmas; those of the pictures' tower are fixed to the released ones."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    vars(config.vision_config).update(sizes, intermediate_size=32, projection_dim=config.text_config.hidden_size)
    return PaliGemmaForConditionalGenerationWithPiGemma(config=config)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in (modeling_pi0, modeling_pi05):
        gemma = lambda variant, module=module: module.GemmaConfig(  # noqa: E731
            32 if variant == "gemma_2b" else 16, 2, 32, 8, 1, 32
        )
        monkeypatch.setattr(module, "get_gemma_config", gemma)
        monkeypatch.setattr(module, "PaliGemmaForConditionalGenerationWithPiGemma", small_paligemma)
    ids = lambda prompts, **kwargs: vars(tokenizer([prompts] if isinstance(prompts, str) else prompts)).values()  # noqa: E731
    encoder = WanTextEncoder(torch.float32, "cpu", pretrained=text_encoder())
    monkeypatch.setattr(modeling_fastwam, "build_wan_tokenizer", lambda **kwargs: ids)
    monkeypatch.setattr(modeling_fastwam, "load_pretrained_wan_text_encoder", lambda **kwargs: encoder)
    wan = WanVideoVAE38(torch.float32, "cpu", pretrained=vae())
    monkeypatch.setattr(modeling_fastwam, "load_pretrained_wan_vae", lambda **kwargs: wan)
    monkeypatch.setattr(modeling_lingbot_va, "load_vae", lambda *args, **kwargs: wan.vae)
    monkeypatch.setattr(modeling_lingbot_va, "load_text_encoder", lambda *args, **kwargs: encoder.model)
    monkeypatch.setattr(modeling_lingbot_va, "load_tokenizer", lambda *args, **kwargs: tokenizer)
    monkeypatch.setattr(lingbot_utils, "torch", TorchInFloat32())
    monkeypatch.setattr(FlexAttnFunc, "forward", dense_flex)
    monkeypatch.setattr(FlexAttnFunc, "flex_attn", flex_attention.flex_attention)
    block_mask = lambda *args, _compile, **kwargs: flex_attention.create_block_mask(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(FlexAttnFunc, "compiled_create_block_mask", staticmethod(block_mask))
    monkeypatch.setattr(_kernels, "DENSE_PAIRS", 0)  # these models are tiny


# ---- policies ----


def made(kind: str, **options) -> nn.Module:
    """From the factory, with the features of a data set of two cameras."""
    torch.manual_seed(0)
    picture = {"dtype": "video", "shape": (3, SIDE, SIDE), "names": ["channels", "height", "width"]}
    features = {camera: picture for camera in CAMERAS}
    features["observation.state"] = {"dtype": "float32", "shape": (STATES,), "names": None}
    features["action"] = {"dtype": "float32", "shape": (ACTIONS,), "names": None}
    return make_policy(make_policy_config(kind, device="cpu", **options), SimpleNamespace(features=features, stats={}))


def fastwam(**options) -> nn.Module:
    expert = {"ffn_dim": 32, "num_heads": 2, "attn_head_dim": 16, "num_layers": 2, "text_dim": TEXT, "freq_dim": 16}
    video = {"hidden_dim": 32, "in_dim": 48, "out_dim": 48, "patch_size": (1, 2, 2), "eps": 1e-6}
    video |= {"seperated_timestep": True, "video_attention_mask_mode": "first_frame_causal"}
    action = {"hidden_dim": 24, "action_dim": ACTIONS, "eps": 1e-6}
    sizes = {"image_size": (SIDE, 2 * SIDE), "action_horizon": 8, "n_action_steps": 8, "num_video_frames": 9}
    sizes |= {"action_video_freq_ratio": 2, "num_inference_steps": 2, "torch_dtype": "float32"}
    configs = {"video_dit_config": expert | video, "action_dit_config": expert | action}
    return made("fastwam", **sizes, **configs, **options)


def lingbot(attn_mode: str) -> nn.Module:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": TEXT, "freq_dim": 16, "ffn_dim": 32}
    chunks = {"num_layers": 2, "height": SIDE, "width": SIDE, "frame_chunk_size": 2, "attn_window": 4}
    steps = {"num_inference_steps": 2, "action_num_inference_steps": 2, "dtype": "float32"}
    return made("lingbot_va", attn_mode=attn_mode, **sizes, **chunks, **steps)


def pi(kind: str, **options) -> nn.Module:
    sizes = {"chunk_size": 6, "n_action_steps": 6, "num_inference_steps": 2, "image_resolution": (SIDE, SIDE)}
    return made(kind, **sizes, empty_cameras=1, **options)


def observation(seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    batch = {camera: torch.rand(1, 3, SIDE, SIDE, generator=g) for camera in CAMERAS}
    ids = torch.randint(1, 100, (1, 12), generator=g)
    batch |= {"observation.language.tokens": ids, "observation.language.attention_mask": torch.arange(12)[None] < 9}
    return batch | {"observation.state": torch.randn(1, STATES, generator=g), "task": [PROMPT]}


def clip(frames: int, actions: int) -> dict:
    """A training batch of two samples; cameras are clips of so many frames, pictures where that is 1."""
    one, two = observation(1), observation(2)
    batch = {name: torch.cat([one[name], two[name]]) for name in one if name != "task"} | {"task": [PROMPT, "open it"]}
    batch["observation.language.attention_mask"][1, 5:] = False
    g = torch.Generator().manual_seed(3)
    if frames > 1:
        batch |= {camera: torch.rand(2, frames, 3, SIDE, SIDE, generator=g) for camera in CAMERAS}
    return batch | {"action": torch.randn(2, actions, ACTIONS, generator=g)}


# the policy, a training batch, the actions of so many observations
POLICIES: dict[str, tuple[Callable, dict | None, int]] = {
    "fastwam": (fastwam, clip(5, 8), 9),
    "fastwam, checkpointed": (
        lambda: fastwam(mot_checkpoint_mixed_attn=True, use_gradient_checkpointing=True), clip(5, 8), 0,
    ),
    "lingbot_va": (lambda: lingbot("torch"), None, 16),
    "lingbot_va, flex": (lambda: lingbot("flex"), clip(8, 8), 0),
    "pi0": (lambda: pi("pi0"), clip(1, 6), 7),
    "pi05": (lambda: pi("pi05"), clip(1, 6), 7),
    "pi0, checkpointed": (lambda: pi("pi0", gradient_checkpointing=True), clip(1, 6), 0),
}  # fmt: skip
every_policy = pytest.mark.parametrize("name", POLICIES)
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
GLUE = {
    "fastwam": "MoTLayer._apply_expert_post_block",
    "lingbot_va": "WanTransformerBlock.forward",
    "pi0": "PI0Pytorch.prepare_attention_masks_4d",  # its masks stay two vectors
    "pi05": "PI05Pytorch.prepare_attention_masks_4d",
}


def loss_and_gradients(policy: nn.Module, batch: dict | None) -> list[Tensor]:
    """As lerobot-train has it; noise and times are drawn from one seed."""
    if batch is None:
        return []
    policy.train()
    policy.zero_grad()
    torch.manual_seed(1)
    loss, _ = policy({name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()})
    loss.backward()
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    assert len(grads) > 20 and any(g.any() for g in grads)
    return [loss.detach(), *grads]


def act(policy: nn.Module, observations: int, mode: str) -> list[Tensor]:
    """As lerobot-eval has it."""
    policy.reset()
    torch.manual_seed(2)
    with MODES[mode]():
        return [policy.select_action(observation(seed)).clone() for seed in range(observations)]


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def ran(done: Patch) -> bool:
    print(done.explain())
    return sum(done.calls.values()) > 0


def test_the_version():
    assert lerobot.__version__ == "0.6.1"


@every_policy
def test_training_and_actions(name):
    make, batch, observations = POLICIES[name]
    policy = make()
    step, actions = loss_and_gradients(policy, batch), act(policy, observations, "no_grad")
    keys, attributes = list(policy.state_dict()), every_attribute(policy)
    done = accelerate(policy)
    ours = []
    for mode in MODES:  # validation between training steps, in either mode
        ours = [*act(policy, observations, mode), *loss_and_gradients(policy, batch)]
        close(ours, [*actions, *step])
    assert done.calls[GLUE[name.partition(",")[0]]] > 0
    assert ran(done) and any(not torch.equal(a, b) for a, b in zip(ours, [*actions, *step], strict=True))
    assert list(policy.state_dict()) == keys
    unpatch(policy)
    assert every_attribute(policy) == attributes
    again = [*act(policy, observations, "no_grad"), *loss_and_gradients(policy, batch)]
    assert all(map(torch.equal, again, [*actions, *step]))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_fastwam_sharded_layer_by_layer(process_group):
    policy = fastwam()
    batch = clip(5, 8)
    expected = loss_and_gradients(policy, batch)
    for layer in policy.model.mot.layers:
        fully_shard(layer)
    fully_shard(policy)
    done = accelerate(policy)
    got = loss_and_gradients(policy, batch)
    close([getattr(t, "full_tensor", lambda t=t: t)() for t in got], expected)
    assert all(done.calls.values()) and ran(done)


def test_pi0_compiled():
    """``sample_actions`` as ``compile_model=True`` compiles it, but without a code generator."""
    policy = pi("pi0")
    expected = act(policy, 1, "no_grad")
    done = patch(policy)
    policy.model.sample_actions = torch.compile(policy.model.sample_actions, backend="eager")
    close(act(policy, 1, "no_grad"), expected)
    assert ran(done)

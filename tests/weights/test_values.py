"""The layouts of classes that no package index has: converted weights give what the real classes gave.

values.safetensors holds the flows of Fast-WAM's WanVideoDiT (45d8e14) and LingBot-VA's WanTransformer3DModel (6f092cb),
three heads of 8, with the weights of ``seeded`` and these inputs, every token attending to every other.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wam_models import WorldActionModel, sizes_from, weights_from
from wam_models.model.blocks import Uncast
from wam_models.weights.layers import attend_to_all

from .test_layouts import KEYS, WITHOUT

VALUES = Path(__file__).parent / "values.safetensors"


def seeded(layout):
    """Weights that give every part of a block a say."""
    generator = torch.Generator().manual_seed(2)
    draw = {key: torch.randn(shape, generator=generator) for key, shape in KEYS[layout].items()}
    return {key: 0.3 * value + (1.5 if ".norm_" in key else 0) for key, value in draw.items()}


def inputs():
    """Latents ``[1, 4, 3, 4, 8]``, timesteps ``[1, 3]``, text ``[1, 5, 8]``, actions ``[1, 3, 2, 5]``."""
    generator = torch.Generator().manual_seed(3)
    video, text, action = (torch.randn(s, generator=generator) for s in ((1, 4, 3, 4, 8), (1, 5, 8), (1, 3, 2, 5)))
    return video, torch.tensor([[0.0, 700.0, 700.0]]), text, action


@pytest.mark.parametrize("layout", ["fast_wam", "lingbot_va"])
def test_the_model_gives_what_the_real_class_gave(layout):
    state = seeded(layout)
    config = sizes_from(layout, state, head_dim=8, actions_per_frame=2)
    model = WorldActionModel(config).requires_grad_(False)
    model.load_state_dict(weights_from(layout, state, config, without=WITHOUT[layout]).state)
    video, times, text, action = inputs()
    frames = torch.arange(3)

    def flow(stream):
        given = (video, times), None
        if stream == "action":
            given = None, (action, times)
        streams = model.embed(*given)
        rope = model.rope(None if given[0] is None else frames, 2, 4, None if given[1] is None else frames)
        out = model.packed_block_stack(
            streams, Uncast(*rope), model.embed_text(text), lambda _, q, k, v: attend_to_all(q, k, v)
        )
        return model.flows(out, 3, 2, 4)[stream == "action"]

    torch.testing.assert_close(flow("video"), load_file(VALUES)[layout], rtol=1e-4, atol=1e-5)
    if layout == "lingbot_va":
        torch.testing.assert_close(flow("action"), load_file(VALUES)["lingbot_va.action"], rtol=1e-4, atol=1e-5)

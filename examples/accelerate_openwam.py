"""One line under OpenWAM: the package's own tiny model, a training step before and after.

pip install 'openwam[train,eval]==0.2.0'        # AGPL; Python 3.11 or 3.12
python examples/accelerate_openwam.py
"""

import time
from importlib.resources import as_file, files

import torch
from open_wam.configs import load_experiment_config
from open_wam.models.policy_variants import PolicyTrainBatch
from open_wam.pipelines import build_variant_pipeline_from_config

from wam_kernels.integrations import openwam

CONFIG = files("open_wam.resources") / "configs" / "examples" / "public_tiny_synthetic_contract.yaml"
with as_file(CONFIG) as path:
    config = load_experiment_config(path)
torch.manual_seed(0)
pipeline = build_variant_pipeline_from_config(config)

data = config.data
frames, per_frame = data.num_frames, data.action_schema.action_horizon // data.num_frames or 1
latents = torch.randn(1, 48, frames, data.canonical_height // 16, data.canonical_width // 16)
batch = PolicyTrainBatch(
    actions=torch.randn(1, data.action_schema.action_horizon, data.action_schema.action_dim),
    state=torch.randn(1, 1, data.action_schema.state_dim),
    extra={"task_text": None, "metadata": None},
)
text = torch.randn(1, 5, 4096)


def step() -> tuple[float, float]:
    """Loss and seconds of a forward and backward."""
    pipeline.zero_grad(set_to_none=True)
    torch.manual_seed(1)  # the package draws timesteps and noise from the global generator
    began = time.perf_counter()
    loss = pipeline.forward_train_from_latents(latents, batch, text_context=text).decoder_output.loss
    loss.backward()
    return loss.item(), time.perf_counter() - began


step()
theirs, seconds = step()
done = openwam.install()  # the one line
step()
ours, ours_seconds = step()
milliseconds = f"{1000 * seconds:.0f} and {1000 * ours_seconds:.0f} ms"
print(f"loss {theirs:.6f} and {ours:.6f}; {milliseconds}, of a tiny model")
assert done is not None  # it is where on_unsupported="original" declined
print(done.explain())
openwam.uninstall()
assert abs(ours - theirs) < 1e-4 * max(1, abs(theirs))

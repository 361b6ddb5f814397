"""wam_kernels works with torch and numpy alone, and what wam_models needs is what its extra names."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"pillow": "PIL"}
# imported where it is there, and reported by name where it is not
OPTIONAL = {"triton", "openwam", "open_wam", "diffusers", "transformers", "accelerate", "metaworld", "mujoco", "libero"}
OPTIONAL |= {"peft", "ray", "websockets", "msgpack", "torchao"}

ALONE = """
import sys

sys.modules |= dict.fromkeys(HIDDEN)  # an import finds None there, and says that there is no such module
import torch
import wam_kernels.integrations
from wam_kernels import *

plan = compile_plan(Geometry(program="joint", video_frames=3, video_tokens=3, action_frames=3, action_tokens=2,
                             chunk_size=1, window=4))
q = torch.randn(1, plan.length, 2, 16, requires_grad=True)
block_attention(q, q, q, plan).sum().backward()
x, s, w = torch.randn(1, 6, 32, requires_grad=True), torch.randn(1, 2, 32), torch.ones(32)
ada_layer_norm(x, s, s, FrameIndex.from_runs([3, 3])).sum().backward()
table = rope_table(torch.randn(6, 3, dtype=torch.float64), 16)
q, k = qk_norm_rope(x, x, w, w, table, head_dim=16)
(q.sum() + k.sum()).backward()
assert not any(map(sys.modules.get, HIDDEN))
"""


def names(requirements: list[str]) -> set[str]:
    found = {r.split(">")[0].split("=")[0].split("[")[0].strip() for r in requirements}
    return {IMPORTED_AS.get(name, name) for name in found}


def imports(package: str) -> set[str]:
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - OPTIONAL


def test_imports_are_the_requirements():
    kernels, models = names(PROJECT["dependencies"]), names(PROJECT["optional-dependencies"]["models"])
    assert imports("wam_kernels") == kernels
    assert imports("wam_models") - {"wam_kernels", "wam_models"} == kernels | models


def test_wam_kernels_alone():
    hidden = names(PROJECT["optional-dependencies"]["models"]) | OPTIONAL | {"pytest", "einops", "matplotlib"}
    done = subprocess.run([sys.executable, "-c", f"HIDDEN = {hidden}\n{ALONE}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

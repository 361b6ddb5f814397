"""What is public, for users and for their editors, and that importing it probes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import wam_kernels
import wam_models


@pytest.mark.parametrize("package", [wam_kernels, wam_models], ids=lambda p: p.__name__)
def test_all_is_sorted_and_there(package):
    assert list(package.__all__) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_dir_completes_the_public_names():
    for package in (wam_kernels, wam_models):
        assert {*package.__all__, "__version__"} <= set(dir(package))


def test_editors_are_told_where_every_lazy_name_is():
    """The imports under TYPE_CHECKING are those that ``__getattr__`` makes."""
    (block,) = [n for n in ast.parse(Path(wam_models.__file__).read_text()).body if isinstance(n, ast.If)]
    told = {alias.asname: node.module for node in block.body for alias in node.names}
    assert told == wam_models.HOME_OF


def test_import_leaves_triton_the_extension_and_a_gpu_alone():
    # a user without triton or a GPU imports the package; what is missing is reported by the call that needs it
    loaded = "[m for m in ('triton', 'wam_kernels._C') if m in sys.modules], torch.cuda.is_initialized()"
    code = f"import sys, torch, wam_kernels; print({loaded})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[] False"

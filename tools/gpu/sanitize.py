"""Every kernel once or twice at small shapes, for compute-sanitizer to watch.   python -m tools.gpu.sanitize

tools/gpu/gpu.sh runs it under memcheck and racecheck; on its own it is a quick test that the kernels run. The cases are
the tests' own; results are compared with the reference there, so a sanitizer's run also checks values.
"""

from __future__ import annotations

import sys
from importlib import import_module

import torch

from wam_kernels.ops import OPS
from wam_models import doctor


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("tools.gpu.sanitize: needs a CUDA device, found none")
    machine = doctor.probe()
    for op in OPS.values():
        checks = import_module(f"tests.{op.package}.checks")
        for impl in op.gpu_backends:
            missing = doctor.missing(op.backends[impl], machine)
            if not missing:
                checks.check_every_kernel(impl)
            print(f"{op.name} {impl}: {f'not run: {missing}' if missing else 'ok'}", flush=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()

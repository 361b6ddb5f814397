"""Build step of wam-kernels: drives CMake for the CUDA extension. Everything else stands in pyproject.toml.

WAM_CUDA=auto (default)  build ``wam_kernels._C`` when nvcc is found, leave it out when it is not
WAM_CUDA=1               build it; an error without nvcc
WAM_CUDA=0               leave it out

WAM_CUDA_ARCHITECTURES   what to compile for, instead of the list in CMakeLists.txt: "89" for an L40S alone. The
                         kernels for Hopper (wgmma, TMA) are compiled for sm_90a whatever it says.

WAM_HOME_URL             where the files of this version can be read, as https://HOST/OWNER/wam-kernels/blob/TAG: on a
                         package index the links of the README lead there. Without it they are plain text.

nvcc is looked for in CUDACXX, CUDA_HOME/bin and PATH. A build that has started and fails is an error in every mode:
a package that quietly lacks its kernels is worse than none. Neither a GPU nor torch is needed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


def find_nvcc() -> str | None:
    cuda_home = os.environ.get("CUDA_HOME")
    candidates = (os.environ.get("CUDACXX"), cuda_home and f"{cuda_home}/bin/nvcc", "nvcc")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def nvcc_to_use() -> str | None:
    mode = os.environ.get("WAM_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"wam-kernels: WAM_CUDA must be 'auto', '0' or '1', got {mode!r}")
    nvcc = None if mode == "0" else find_nvcc()
    if mode == "1" and nvcc is None:
        raise SystemExit(
            "wam-kernels: WAM_CUDA=1 asks for the CUDA extension, but there is no nvcc in CUDACXX, CUDA_HOME/bin or "
            "PATH; install the CUDA toolkit, point CUDA_HOME at it, or set WAM_CUDA=auto"
        )
    return nvcc


class BuildPy(build_py):
    def run(self):
        if NVCC is None:
            why = "WAM_CUDA=0" if os.environ.get("WAM_CUDA") == "0" else "no nvcc in CUDACXX, CUDA_HOME/bin or PATH"
            print(f"wam-kernels: the CUDA extension wam_kernels._C is left out: {why}")
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11  # of the build environment, see [build-system] in pyproject.toml

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        self.cmake(
            # --fresh: a build folder may remember another compiler or a build environment that is gone
            "--fresh", "-S", ROOT, "-B", build_dir, "-G", "Ninja",
            f"-DCMAKE_CUDA_COMPILER={NVCC}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        )  # fmt: skip
        self.cmake("--build", build_dir)
        if not target.is_file():
            raise SystemExit(f"wam-kernels: CMake built no {target.name} in {target.parent}")

    @staticmethod
    def cmake(*args):
        try:
            subprocess.run(["cmake", *map(str, args)], check=True)
        except FileNotFoundError:
            raise SystemExit("wam-kernels: the CUDA extension needs cmake, which is not on PATH") from None
        except subprocess.CalledProcessError:
            raise SystemExit(
                f"wam-kernels: the CUDA extension could not be built with {NVCC}; the compiler's own message stands "
                "above. To install without the extension, set WAM_CUDA=0"
            ) from None


def index_page() -> str:
    """The README without relative links, which lead nowhere on a package index: absolute, or their text alone."""
    home = os.environ.get("WAM_HOME_URL", "").rstrip("/")

    def link(match: re.Match) -> str:
        mark, text, target = match.groups()
        if "://" in target:
            return match[0]
        return f"{mark}[{text}]({home}/{target}{'?raw=true' if mark else ''})" if home else text

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)]+)\)", link, (ROOT / "README.md").read_text())


NVCC = nvcc_to_use()
setup(
    long_description=index_page(),
    long_description_content_type="text/markdown",
    # without an extension the wheel is a pure Python one
    ext_modules=[Extension("wam_kernels._C", sources=[])] if NVCC else [],
    cmdclass={"build_py": BuildPy, "build_ext": CMakeBuild},
)

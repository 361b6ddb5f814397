"""The Triton kernels on the CPU: ``TRITON_INTERPRET=1 pytest tests/interpreter``, a process of its own."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreter needs TRITON_INTERPRET=1 (make test sets it) and a process of its own")

from tests.interpreter import bf16

bf16.install()

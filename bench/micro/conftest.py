"""One thread, and nothing in a saved baseline that names a person's machine."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["node"] = ""
    machine_info["torch"] = torch.__version__

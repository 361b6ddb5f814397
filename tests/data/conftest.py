"""The data sets of these tests: the one that ships, and tiny ones that a test may damage."""

import shutil

import pytest

from tests.data import tiny


@pytest.fixture
def tiny_root(shared_tiny_root, tmp_path):
    return shutil.copytree(shared_tiny_root, tmp_path / "tiny")


@pytest.fixture(scope="session")
def shared_tiny_root(tmp_path_factory):
    """For tests that only read."""
    return tiny.write(tmp_path_factory.mktemp("shared") / "tiny")

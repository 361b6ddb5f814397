"""Runs of the commands on damaged files."""

import json
import os
import shutil

import pytest

from tests.data import tiny
from tests.malformed.cases import CONFIG
from wam_models import cli


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A tiny data set ``data``, a training config ``config.json``, and a ``run`` of one step."""
    root = tmp_path_factory.mktemp("sound")
    tiny.write(root / "data")
    (root / "config.json").write_text(json.dumps(CONFIG))
    made = ("--data", root / "data", root / "config.json", "--out", root / "run")
    assert cli.main(["train", "--steps", "1", *map(str, made)]) == 0
    return root


@pytest.fixture
def folder(sound, tmp_path):
    """The same for one test; files are hard links, so they are to be replaced, never written in place."""
    return shutil.copytree(sound, tmp_path / "given", copy_function=os.link)

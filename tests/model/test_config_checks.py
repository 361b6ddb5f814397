"""Every field of a config refuses what it cannot mean by name, when it is made, and keeps Python's own numbers."""

import json
import math
import sys
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch

from wam_models import RolloutConfig, TrainingConfig, WorldActionModel, golden_config
from wam_models.flow import TimestepDraw
from wam_models.rollout import RolloutEngine

BAD = {
    "int": [2.0, 4.5, "4", True, np.bool_(True), None, math.nan, -1, 0, [2], torch.tensor([2]), torch.tensor(True)],
    "float": [math.nan, math.inf, -math.inf, -1, "1.0", None, True, 1j, 10**400, [1.0]],
    "str": ["none", None, 3, ["joint"], np.array(["joint", "full"])],
    "bool": [1, 0, "no", None, 1.0],
    "tuple[int, int]": [(4, 1), (0, 4), (1,), (1, 2, 3), 4, "14", (1.0, 4), (True, 4), (1, sys.maxsize), None],
    "Mapping[str, float]": [None, {}, {"dream": 1.0}, {"joint": 0.0}, {"joint": math.nan}, {"joint": "1"}, ["joint"]],
    "TimestepDraw": [None, {}, "independent"],
}
GOOD = {
    "int": [np.int64(3), np.uint8(3), torch.tensor(3)],
    "float": [1, np.float32(0.5), np.float64(0.5), np.int16(1)],
    "bool": [np.bool_(False)],
    "tuple[int, int]": [[2, 3], np.array([2, 3]), torch.tensor([2, 3])],
}
FIELDS = [(config, f.name, f.type) for config in (RolloutConfig, TrainingConfig, TimestepDraw) for f in fields(config)]


@pytest.mark.parametrize("config,name,kind", FIELDS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_fields(config, name, kind):
    for value in BAD[kind]:
        with pytest.raises(ValueError, match=rf"{config.__name__}: {name}\b.* must "):
            config(**{name: value})
    for value in GOOD.get(kind, ()):
        made = config(**{name: value})
        json.dumps(asdict(made))
        assert made == config(**{name: value.tolist() if hasattr(value, "tolist") else value})


@pytest.mark.parametrize("field", ["window", "chunk_size", "lookahead"])
@pytest.mark.parametrize("everything", [10**9, sys.maxsize])
def test_rings_beyond_the_memory_are_refused_before_they_are_made(field, everything):
    model = WorldActionModel(golden_config())
    engine = RolloutEngine(model, RolloutConfig(**{field: everything}))
    with pytest.raises(ValueError, match=rf"start: .*{field}={everything}.*bytes.*use window"):
        engine.start(torch.zeros(1, 48, 1, 4, 4), torch.zeros(1, 3, 4096))
    with pytest.raises(TypeError, match="config must be a RolloutConfig, got dict"):
        RolloutEngine(model, asdict(engine.config))

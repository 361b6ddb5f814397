"""Damaged training configs, through ``wam train``."""

import pytest

from . import cases
from .cases import GONE, TRAIN, raw, trains

NAN, INF = float("nan"), float("inf")
FILE = "config.json"
CONFIG = {
    "empty": (raw(FILE, b""), "config.json: not valid JSON"),
    "truncated": (raw(FILE, lambda old: old[:-9]), "config.json: not valid JSON"),
    "not UTF-8": (raw(FILE, b'{"schedule": "\xfc"}'), "config.json: not valid JSON", "utf-8"),
    "nested too deep": (raw(FILE, b"[" * 200_000), "config.json: not valid JSON"),
    "a key twice": (raw(FILE, b'{"batch": 1, "batch": 2}'), "config.json", "key 'batch' twice"),
    "missing": (raw(FILE, GONE), "config.json: No such file"),
    "a list": (raw(FILE, b"[]"), "config.json: must be an object of fields, got []"),
    "null": (raw(FILE, b"null"), "config.json: must be an object of fields, got None"),
    "unknown field": (trains("stepz", 3), "config.json: unknown fields ['stepz']"),
    "batch 0": (trains("batch", 0), "config.json", "batch must be a whole number from 1 to 1048576, got 0"),
    "batch true": (trains("batch", True), "config.json", "batch must be a whole number", "True"),
    "batch beyond any": (trains("batch", 10**30), "config.json", "batch must be a whole number"),
    "frames a float": (trains("frames", 5.0), "config.json", "frames must be a whole number of at least 2, got 5.0"),
    "frames too many": (trains("frames", 10**30), "frames must be at most 6"),
    "steps 0": (trains("steps", 0), "config.json", "steps must be a whole number of at least 1, got 0"),
    "steps a string": (trains("steps", "8"), "config.json", "steps must be a whole number", "'8'"),
    "warmup negative": (trains("warmup", -1), "config.json", "warmup must be a whole number of at least 0, got -1"),
    "save_every 0": (trains("save_every", 0), "config.json", "save_every must be a whole number of at least 1, got 0"),
    "learning_rate a string": (trains("learning_rate", "fast"), "config.json", "learning_rate must be", "'fast'"),
    "learning_rate 0": (trains("learning_rate", 0), "config.json", "learning_rate must be", "got 0"),
    "learning_rate NaN": (trains("learning_rate", NAN), "config.json", "learning_rate must be", "nan"),
    "learning_rate Infinity": (trains("learning_rate", INF), "config.json", "learning_rate must be", "inf"),
    "learning_rate absurd": (trains("learning_rate", 1e300), "config.json", "must be a number from 1e-12 to 100"),
    "clip_norm null": (trains("clip_norm", None), "config.json", "clip_norm must be", "None"),
    "weight_decay negative": (trains("weight_decay", -1), "config.json", "weight_decay must be", "-1"),
    "ema a list": (trains("ema", [7]), "config.json", "ema must be", "[7]"),
    "beta2 1": (trains("beta2", 1), "config.json", "beta2 must be a number from 0 to 0.999999, got 1"),
    "noised_history above 1": (trains("noised_history", 1.5), "config.json", "noised_history must be", "1.5"),
    "video_weight huge": (trains("video_weight", 10**400), "config.json", "video_weight must be"),
    "video_shift 0": (trains("video_shift", 0), "config.json", "video_shift must be a number from 0.001 to 1000"),
    "action_shift tiny": (trains("action_shift", 1e-9), "config.json", "action_shift must be a number from 0.001"),
    "chunk_sizes backwards": (trains("chunk_sizes", [4, 1]), "config.json", "chunk_sizes must be two whole numbers"),
    "chunk_sizes of three": (trains("chunk_sizes", [1, 2, 3]), "config.json", "chunk_sizes must be two whole numbers"),
    "chunk_sizes of floats": (trains("chunk_sizes", [1.0, 2]), "config.json", "chunk_sizes[0] must be a whole number"),
    "windows a number": (trains("windows", 4), "config.json", "windows must be a sequence of whole numbers, got 4"),
    "windows beyond int64": (trains("windows", [4, 2**70]), "config.json", "windows[1] must be a whole number"),
    "programs unknown": (trains("programs", ["waltz"]), "config.json", "programs must be some of", "'waltz'"),
    "programs empty": (trains("programs", []), "config.json", "programs must be some of"),
    "programs repeated": (trains("programs", ["joint", "joint"]), "config.json", "programs must be", "each once"),
    "programs a string": (trains("programs", "joint"), "config.json", "programs must be some of", "'joint'"),
    "programs without end": (trains("programs", "joint " * 10**5), "config.json", "programs must be some of"),
    "programs of objects": (trains("programs", [{}]), "config.json", "programs must be some of"),
    "mixture negative": (trains("mixture", {"joint": -1}), "config.json", "mixture['joint'] must be"),
    "mixture unknown": (trains("mixture", {"dreams": 1}), "config.json", "mixture must map some of"),
    "mixture a list": (trains("mixture", ["joint"]), "config.json", "mixture must map some of"),
    "mixture of 0": (trains("mixture", {"joint": 0}), "config.json", "mixture must have weights"),
    "mixture overflowing": (
        trains("mixture", dict.fromkeys(("joint", "forward_dynamics"), 1e308)), "config.json", "mixture must have",
    ),
    "levels_per unknown": (trains("levels_per", "year"), "config.json", "levels_per must be one of", "'year'"),
    "coupling unknown": (trains("coupling", "loose"), "config.json", "coupling must be one of", "'loose'"),
    "rollout a number": (trains("rollout", 3), "config.json", "rollout must be a table of", "got 3"),
    "rollout unknown": (trains("rollout", {"stepz": 3}), "config.json", "rollout: unknown fields ['stepz'] (is steps"),
    "rollout of noise": (trains("rollout", {"action": {"stop": 0.5}}), "rollout: RolloutConfig: action must have stop"),
    "history unknown": (trains("history", "none"), "config.json", "history must be one of", "'none'"),
    "schedule unknown": (trains("schedule", "zigzag"), "config.json", "schedule must be one of", "'zigzag'"),
    "schedule a list": (trains("schedule", ["decay"]), "config.json", "schedule must be one of", "['decay']"),
    "model a number": (trains("model", 7), "config.json: model: must be an object of fields, got 7"),
    "model unknown field": (trains("model.depth", 3), "config.json: model: unknown fields ['depth']"),
    "model hidden 0": (trains("model.hidden", 0), "config.json: model: ModelConfig: hidden must be a whole number"),
    "model patch a number": (trains("model.patch", 2), "config.json: model: ModelConfig: patch must be", "got 2"),
    "model patch too large": (trains("model.patch", [1, 4, 4]), "model.patch must divide", "(1, 4, 4)"),
    "model of another data set": (trains("model.action_dim", 8), "model.action_dim must be 7", "got 8"),
    "model of narrow actions": (trains("model.action_hidden", 8), "model.action_hidden must be at least 9", "got 8"),
    "model beyond memory": (trains("model.hidden", 2**20), "WorldActionModel: config has", "hidden"),
}  # fmt: skip


@pytest.mark.parametrize("damage, words", [(row[0], row[1:]) for row in CONFIG.values()], ids=CONFIG)
def test_training_by_a_damaged_config(damage, words, folder, capsys):
    cases.check(folder, capsys, TRAIN, damage, words)

"""Damaged training states, through ``wam train --resume``."""

import json
import pickle
import shutil

import pytest
import torch

from . import cases
from .cases import GONE, RESUME, RESUME_HERE, SAVED, STATE, Accepted, entry, raw, state, value

NAN = float("nan")
PLACES = "text.places"
WEIGHT, MEAN = f"weights.{PLACES}", f"average.{PLACES}"
ADAMW = "optimizer.model.core.proj_out.weight"  # Muon has the matrices of the blocks
MUON = "optimizer.model.packed_block_stack.packed_blocks.0.video_block.attn1.to_q.weight.average"
INDEX, NUMBERS, VALUE = f"{STATE}/.metadata", f"{STATE}/__0_0.distcp", f"{STATE}/values.json"
STATES = {
    "empty": (raw(INDEX, b""), ".metadata"),
    "truncated": (raw(INDEX, lambda old: old[: len(old) // 2]), ".metadata"),
    "text": (raw(INDEX, b"step 7, all is well"), ".metadata"),
    "evil": (raw(INDEX, b"cos\nsystem\n(S'touch evil'\ntR."), ".metadata", "more than tensors", "os.system"),
    "evil by a module's module": (
        raw(INDEX, b"\x80\x04ctorch.distributed.checkpoint.metadata\nos.system\n(S'touch evil'\ntR."),
        ".metadata", "more than tensors",
    ),
    "of numbers": (raw(INDEX, pickle.dumps([1, 2])), ".metadata", "more than tensors"),
    "without index": (raw(INDEX, GONE), ".metadata", "No such file"),
    "numbers empty": (raw(NUMBERS, b""), "training"),
    "numbers truncated": (raw(NUMBERS, lambda old: old[: len(old) // 2]), "training"),
    "numbers of zeros": (raw(NUMBERS, lambda old: bytes(len(old))), "training"),
    "numbers missing": (raw(NUMBERS, GONE), "training", "No such file"),
    "missing": (cases.removed(STATE), "training"),
    "a file": (lambda folder: (shutil.rmtree(folder / STATE), (folder / STATE).touch()), "training"),
    "values missing": (raw(VALUE, GONE), "values.json"),
    "values no JSON": (raw(VALUE, b"{"), "values.json", "not valid JSON"),
    "values a list": (raw(VALUE, b"[1, 2]"), "values.json", "list"),
    "step missing": (value("step", GONE), "values.json", "step"),
    "step a string": (value("step", "1"), "values.json", "step", "'1'"),
    "step a float": (value("step", 1.5), "values.json", "step", "1.5"),
    "step negative": (value("step", -1), "values.json", "step", "-1"),
    "step true": (value("step", True), "values.json", "step", "True"),
    "planned missing": (value("planned", GONE), "values.json", "planned"),
    "planned a string": (value("planned", "soon"), "values.json", "planned", "'soon'"),
    "planned 0": (value("planned", 0), "values.json", "planned", "0"),
    "an unknown value": (value("colour", 1), "values.json", "colour"),
    "generator missing": (state("generator", GONE), "training", "generator"),
    "generator short": (state("generator", lambda t: t[:100].clone()), "training", "generator"),
    "generator of floats": (state("generator", torch.Tensor.float), "training", "generator"),
    "generator of zeros": (state("generator", torch.zeros_like), "training", "generator"),
    "weights without one": (state(WEIGHT, GONE), "training", WEIGHT),
    "weights mis-shaped": (state(WEIGHT, torch.zeros(1)), "training", WEIGHT),
    "weights NaN": (state(WEIGHT, lambda t: t * NAN), "training", WEIGHT),
    "weights int": (state(WEIGHT, torch.Tensor.int), "training", WEIGHT),
    "weights further": (state("weights.more", torch.zeros(1)), "training", "weights.more"),
    "average without one": (state(MEAN, GONE), "training", MEAN),
    "average NaN": (state(MEAN, lambda t: t * NAN), "training", MEAN),
    "momentum mis-shaped": (state(f"{ADAMW}.exp_avg", torch.zeros(3)), "training", f"{ADAMW}.exp_avg"),
    "momentum int": (state(f"{ADAMW}.exp_avg", torch.Tensor.int), "training", f"{ADAMW}.exp_avg"),
    "momentum further": (state(f"{ADAMW}.more", torch.zeros(1)), "training", f"{ADAMW}.more"),
    "momentum NaN": (state(f"{ADAMW}.exp_avg", lambda t: t * NAN), "training", f"{ADAMW}.exp_avg"),
    "momentum missing": (state(f"{ADAMW}.exp_avg", GONE), "training", f"{ADAMW}.exp_avg"),
    "momentum's step mis-shaped": (state(f"{ADAMW}.step", torch.zeros(3)), "training", f"{ADAMW}.step"),
    "momentum's step NaN": (state(f"{ADAMW}.step", torch.tensor(NAN)), "training", f"{ADAMW}.step"),
    "momentum's step negative": (state(f"{ADAMW}.step", torch.tensor(-5.0)), "training", f"{ADAMW}.step"),
    "squares negative": (state(f"{ADAMW}.exp_avg_sq", torch.neg), "training", "exp_avg_sq"),
    "Muon NaN": (state(MUON, lambda t: t * NAN), "training", MUON),
}  # fmt: skip
CONFIGS = {
    "training missing": (entry(SAVED, "metadata.training", GONE), "training"),
    "training null": (entry(SAVED, "metadata.training", None), "training"),
    "training a list": (entry(SAVED, "metadata.training", [1]), "training"),
    "config missing": (entry(SAVED, "metadata.training.config", GONE), "config"),
    "config a string": (entry(SAVED, "metadata.training.config", "small"), "config", "'small'"),
    "config unknown field": (entry(SAVED, "metadata.training.config.stepz", 3), "config.json", "['stepz']"),
    "config nonsense": (entry(SAVED, "metadata.training.config.batch", 0), "config.json", "batch must be"),
    "config of another model": (entry(SAVED, "metadata.training.config.model.ffn", 64), "ffn"),
    "seed missing": (entry(SAVED, "metadata.training.seed", GONE), "config.json", "seed"),
    "seed a string": (entry(SAVED, "metadata.training.seed", "one"), "config.json", "seed", "'one'"),
    "seed negative": (entry(SAVED, "metadata.training.seed", -1), "config.json", "seed", "-1"),
    "seed beyond int64": (entry(SAVED, "metadata.training.seed", 2**64), "config.json", "seed"),
}

LOG = "run/log.jsonl"
UNREAD = "rows that cannot be read, as a kill leaves them, are dropped"
LOGS = {
    "missing": (raw(LOG, GONE), Accepted("the log is for people; the steps that follow are written to a new one")),
    "not UTF-8": (raw(LOG, b"\xff\xff\n"), Accepted(UNREAD)),
    "of text": (raw(LOG, b"it went well\n"), Accepted(UNREAD)),
    "of lists": (raw(LOG, b"[1, 2]\n"), Accepted(UNREAD)),
    "of steps as text": (raw(LOG, b'{"step": "1"}\n'), Accepted(UNREAD)),
    "without steps": (raw(LOG, b'{"loss": 1}\n'), Accepted(UNREAD)),
    "nested too deep": (raw(LOG, b"[" * 100_000 + b"\n"), Accepted(UNREAD)),
    "a folder": (cases.directory(LOG), "log.jsonl: Is a directory"),
}


TABLE = {
    f"{part}: {name}": row for part, rows in (("state", STATES), ("config", CONFIGS)) for name, row in rows.items()
}


@pytest.mark.parametrize("damage, words", [(row[0], row[1:]) for row in TABLE.values()], ids=TABLE)
def test_resuming_from_a_damaged_checkpoint(damage, words, folder, capsys):
    cases.check(folder, capsys, RESUME, damage, words)
    assert not (folder / "evil").exists()


@pytest.mark.parametrize("damage, words", [(row[0], row[1:]) for row in LOGS.values()], ids=LOGS)
def test_going_on_with_a_damaged_log(damage, words, folder, capsys):
    cases.check(folder, capsys, RESUME_HERE, damage, words)
    if isinstance(words[0], Accepted):
        assert [json.loads(line)["step"] for line in (folder / LOG).read_text().splitlines()] == [2]

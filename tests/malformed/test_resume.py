"""Damaged training states, through ``wam train --resume``."""

import json

import pytest
import torch

from . import cases
from .cases import GONE, RESUME, RESUME_HERE, SAVED, STATE, Accepted, entry, raw, state

NAN = float("nan")
SETTINGS = "an optimizer's settings come from the config"
ADAMW = ("optimizers", 1)  # beside Muon, 0
STATES = {
    "empty": (raw(STATE, b""), "training.pt"),
    "truncated": (raw(STATE, lambda old: old[: len(old) // 2]), "training.pt"),
    "text": (raw(STATE, b"step 7, all is well"), "training.pt"),
    "evil": (raw(STATE, b"cos\nsystem\n(S'touch evil'\ntR."), "training.pt"),
    "missing": (raw(STATE, GONE), "training"),
    "a folder": (cases.directory(STATE), "training.pt"),
    "a list": (lambda folder: replace(folder, [1, 2]), "training.pt", "list"),
    "None": (lambda folder: replace(folder, None), "training.pt", "NoneType"),
    "a tensor": (lambda folder: replace(folder, torch.zeros(2)), "training.pt", "Tensor"),
    "step missing": (state(["step"], GONE), "training.pt", "step"),
    "step a string": (state(["step"], "1"), "training.pt", "step", "'1'"),
    "step a float": (state(["step"], 1.5), "training.pt", "step", "1.5"),
    "step negative": (state(["step"], -1), "training.pt", "step", "-1"),
    "step true": (state(["step"], True), "training.pt", "step", "True"),
    "planned missing": (state(["planned"], GONE), "training.pt", "planned"),
    "planned a string": (state(["planned"], "soon"), "training.pt", "planned", "'soon'"),
    "generator missing": (state(["generator"], GONE), "training.pt", "generator"),
    "generator short": (state(["generator"], lambda t: t[:100]), "training.pt", "generator"),
    "generator of floats": (state(["generator"], torch.Tensor.float), "training.pt", "generator"),
    "generator a string": (state(["generator"], "seed"), "training.pt", "generator"),
    "generator of zeros": (state(["generator"], torch.zeros_like), "training.pt", "generator"),
    "weights missing": (state(["weights"], GONE), "training.pt", "weights"),
    "weights a list": (state(["weights"], [1]), "training.pt", "weights"),
    "weights without one": (state(["weights", "text.places"], GONE), "training.pt", "text.places"),
    "weights of other things": (state(["weights", "text.places"], "none"), "training.pt", "text.places"),
    "weights mis-shaped": (state(["weights", "text.places"], torch.zeros(1)), "training.pt", "text.places"),
    "weights NaN": (state(["weights", "text.places"], lambda t: t * NAN), "training.pt", "text.places"),
    "weights int": (state(["weights", "text.places"], torch.Tensor.int), "training.pt", "text.places"),
    "optimizers missing": (state(["optimizers"], GONE), "training.pt", "optimizers"),
    "optimizers one": (state(["optimizers"], lambda o: o[:1]), "training.pt", "optimizers"),
    "optimizers swapped": (state(["optimizers"], lambda o: o[::-1]), "training.pt", "optimizers"),
    "optimizers a string": (state(["optimizers"], "muon"), "training.pt", "optimizers"),
    "optimizers of other sizes": (state([*ADAMW, "param_groups", 0, "params"], [0]), "training.pt", "optimizers"),
    "optimizers without groups": (state([*ADAMW, "param_groups"], GONE), "training.pt", "optimizers"),
    "momentum mis-shaped": (state([*ADAMW, "state", 0, "exp_avg"], torch.zeros(3)), "training.pt", "optimizers"),
    "betas a string": (state([*ADAMW, "param_groups", 0, "betas"], "often"), Accepted(SETTINGS)),
    "weight_decay NaN": (state([*ADAMW, "param_groups", 0, "weight_decay"], NAN), Accepted(SETTINGS)),
    "eps missing": (state([*ADAMW, "param_groups", 0, "eps"], GONE), Accepted(SETTINGS)),
    "a further setting": (state([*ADAMW, "param_groups", 0, "speed"], 3), Accepted(SETTINGS)),
    "no momenta": (state([*ADAMW, "state"], {}), "training.pt", "optimizers", "state must be of parameters"),
    "groups of numbers": (state([*ADAMW, "param_groups"], [1, 2]), "training.pt", "optimizers"),
    "state a list": (state([*ADAMW, "state"], []), "training.pt", "optimizers"),
    "state of a parameter a number": (state([*ADAMW, "state", 0], 3), "training.pt", "optimizers"),
    "state of another parameter": (state([*ADAMW, "state", 999], {}), "training.pt", "optimizers"),
    "momentum a string": (state([*ADAMW, "state", 0, "exp_avg"], "up"), "training.pt", "optimizers"),
    "momentum int": (state([*ADAMW, "state", 0, "exp_avg"], torch.Tensor.int), "training.pt", "optimizers"),
    "momentum further": (state([*ADAMW, "state", 0, "more"], torch.zeros(1)), "training.pt", "optimizers"),
    "momentum's step mis-shaped": (state([*ADAMW, "state", 0, "step"], torch.zeros(3)), "training.pt", "optimizers"),
    "momentum's step NaN": (state([*ADAMW, "state", 0, "step"], torch.tensor(NAN)), "training.pt", "optimizers"),
    "momentum's step negative": (state([*ADAMW, "state", 0, "step"], torch.tensor(-5.0)), "training.pt", "optimizers"),
    "Muon NaN": (state(["optimizers", 0, "state", 0, "average"], lambda t: t * NAN), "training.pt", "optimizers"),
    "squares negative": (state([*ADAMW, "state", 0, "exp_avg_sq"], torch.neg), "training.pt", "exp_avg_sq"),
    "weights further": (state(["weights", "more"], torch.zeros(1)), "training.pt", "weights", "more"),
    "an unknown entry": (state(["colour"], 1), "training.pt", "colour"),
    "planned 0": (state(["planned"], 0), "training.pt", "planned", "0"),
    "momentum NaN": (state([*ADAMW, "state", 0, "exp_avg"], lambda t: t * NAN), "training.pt", "optimizers"),
    "momentum missing": (state([*ADAMW, "state", 0, "exp_avg"], GONE), "training.pt", "optimizers"),
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


def replace(folder, value):
    (folder / STATE).unlink()
    torch.save(value, folder / STATE)


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

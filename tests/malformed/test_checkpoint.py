"""Damaged checkpoint folders, through ``wam rollout``."""

import json

import pytest
import safetensors.torch
import torch

from . import cases
from .cases import (
    EXTRA,
    GONE,
    MODEL,
    ROLLOUT,
    SAVED,
    STATE,
    Accepted,
    every_tensor,
    raw,
    rollout,
    saved,
    tensor,
    with_value,
)

HIDDEN = "packed_block_stack.packed_blocks.0.video_block.attn1.to_q.weight"  # [32, 32]
BIAS = "core.proj_out.bias"
CONFIG = {
    "empty": (raw(SAVED, b""), "config.json: not valid JSON"),
    "truncated": (raw(SAVED, lambda old: old[: len(old) // 2]), "config.json: not valid JSON"),
    "not UTF-8": (raw(SAVED, b'{"model": "\xff"}'), "config.json: not valid JSON", "utf-8"),
    "UTF-16": (raw(SAVED, lambda old: old.decode().encode("utf-16")), "config.json: not valid JSON", "utf-8"),
    "a byte order mark": (raw(SAVED, lambda old: b"\xef\xbb\xbf" + old), "config.json: not valid JSON", "BOM"),
    "nested too deep": (raw(SAVED, b"[" * 200_000), "config.json: not valid JSON"),
    "a number of 5000 digits": (raw(SAVED, b'{"model": ' + b"9" * 5000 + b"}"), "config.json: not valid JSON"),
    "a key twice": (raw(SAVED, lambda old: b'{"model": 1,' + old[1:]), "config.json", "key 'model' twice"),
    "missing": (raw(SAVED, GONE), "config.json: No such file"),
    "a folder": (cases.directory(SAVED), "config.json: Is a directory"),
    "a list": (raw(SAVED, b"[]"), "config.json must hold an object with a 'model' entry"),
    "null": (raw(SAVED, b"null"), "config.json must hold an object with a 'model' entry"),
    "no model": (saved("model", GONE), "config.json must hold an object with a 'model' entry"),
    "unknown entry": (saved("modle", {}), "config.json", "unknown", "modle"),
    "model null": (saved("model", None), "config.json: model: must be an object of fields, got None"),
    "model a list": (saved("model", [1, 2]), "config.json: model: must be an object of fields, got [1, 2]"),
    "model unknown field": (saved("model.depth", 3), "config.json: model: unknown fields ['depth']"),
    "model missing field": (saved("model.ffn", GONE), "config.json: model: missing fields ['ffn']"),
    "hidden a string": (saved("model.hidden", "32"), "config.json", "hidden must be a whole number", "'32'"),
    "hidden a float": (saved("model.hidden", 32.0), "config.json", "hidden must be a whole number", "32.0"),
    "hidden negative": (saved("model.hidden", -32), "config.json", "hidden must be a whole number", "-32"),
    "hidden true": (saved("model.hidden", True), "config.json", "hidden must be a whole number", "True"),
    "hidden null": (saved("model.hidden", None), "config.json", "hidden must be a whole number", "None"),
    "hidden a list": (saved("model.hidden", [32]), "config.json", "hidden must be a whole number", "[32]"),
    "hidden beyond any": (saved("model.hidden", 10**30), "config.json", "hidden must be a whole number from 1 to"),
    "hidden beyond memory": (saved("model.hidden", 10**6), "config.json: WorldActionModel: config has", "more than"),
    "hidden another": (saved("model.hidden", 64), "model.safetensors", "expected [64", "got [32", "same config"),
    "layers beyond any": (saved("model.layers", 10**9), "config.json", "layers must be a whole number from 1 to"),
    "layers one more": (saved("model.layers", 2), "model.safetensors", "missing keys", "packed_blocks.1", "more"),
    "heads another": (saved("model.heads", 3), "model.safetensors", "expected [48", "got [32"),
    "head_dim odd": (saved("model.head_dim", 15), "config.json", "head_dim must be even, got 15"),
    "freq_dim odd": (saved("model.freq_dim", 15), "config.json", "freq_dim must be even, got 15"),
    "action_dim another": (saved("model.action_dim", 8), "model.safetensors", "got [32, 7]"),
    "actions_per_frame another": (saved("model.actions_per_frame", 3), "config.json", "actions_per_frame must be 4"),
    "text_dim another": (saved("model.text_dim", 9), "model.safetensors", "got [32, 8]"),
    "patch of two": (saved("model.patch", [1, 2]), "config.json", "patch must be (1, rows, columns), got [1, 2]"),
    "patch over frames": (saved("model.patch", [2, 2, 2]), "config.json", "patch must be (1, rows, columns)"),
    "patch of floats": (saved("model.patch", [1, 2.0, 2]), "config.json", "patch[1] must be a whole number", "2.0"),
    "patch of nothing": (saved("model.patch", [1, 0, 2]), "config.json", "patch[1] must be a whole number", "got 0"),
    "patch a string": (saved("model.patch", "122"), "config.json", "patch must be a sequence", "'122'"),
    "patch a number": (saved("model.patch", 2), "config.json", "patch must be a sequence", "got 2"),
    "rope_theta NaN": (saved("model.rope_theta", float("nan")), "config.json", "rope_theta must be a number", "nan"),
    "rope_theta Infinity": (
        saved("model.rope_theta", float("inf")),
        "config.json",
        "rope_theta must be a number",
        "inf",
    ),
    "rope_theta 0": (saved("model.rope_theta", 0), "config.json", "rope_theta must be a number from 1"),
    "rope_theta a string": (saved("model.rope_theta", "10"), "config.json", "rope_theta must be a number", "'10'"),
    "eps 0": (saved("model.eps", 0), "config.json", "eps must be a number from 1e-12 to 1, got 0"),
    "text_tokens a string": (saved("text_tokens", "8"), "config.json", "tokens must be a whole number", "'8'"),
    "text_tokens negative": (saved("text_tokens", -1), "config.json", "tokens must be a whole number", "-1"),
    "text_tokens a float": (saved("text_tokens", 1.5), "config.json", "tokens must be a whole number", "1.5"),
    "text_tokens missing": (saved("text_tokens", GONE), "config.json", "text_tokens"),
    "text_tokens beyond memory": (saved("text_tokens", 10**12), "config.json", "tokens must be a whole number"),
    "text_tokens another": (saved("text_tokens", 5), "extra.safetensors", "text.places: expected [5, 8]"),
    "vocabulary missing": (saved("vocabulary", GONE), "config.json", "vocabulary"),
    "vocabulary null": (saved("vocabulary", None), "config.json", "vocabulary must be a list of words, got None"),
    "vocabulary a string": (saved("vocabulary", "lift"), "config.json", "vocabulary must be a list", "'lift'"),
    "vocabulary of numbers": (saved("vocabulary", [1, 2]), "config.json", "single lower-case words, got [1, 2]"),
    "vocabulary of sentences": (saved("vocabulary", ["lift it", "a"]), "config.json", "got ['lift it']"),
    "vocabulary with repeats": (saved("vocabulary", ["lift", "lift"]), "config.json", "each word once"),
    "vocabulary one less": (saved("vocabulary", ["lift"]), "extra.safetensors", "text.words.weight: expected [2, 8]"),
    "metadata missing": (saved("metadata", GONE), "config.json", "metadata.rollout is missing"),
    "metadata null": (saved("metadata", None), "config.json", "metadata must be an object"),
    "metadata a list": (saved("metadata", []), "config.json", "metadata must be an object"),
    "rollout missing": (saved("metadata.rollout", GONE), "config.json", "metadata.rollout is missing"),
    "rollout null": (
        saved("metadata.rollout", None),
        "config.json: metadata.rollout: must be an object of fields, got None",
    ),
    "rollout unknown field": (rollout("speed", 1), "config.json: metadata.rollout: unknown fields ['speed']"),
    "rollout missing field": (rollout("window", GONE), "config.json: metadata.rollout: missing fields ['window']"),
    "chunk_size a float": (rollout("chunk_size", 2.5), "config.json", "chunk_size must be a whole number", "2.5"),
    "chunk_size a whole float": (rollout("chunk_size", 2.0), "config.json", "chunk_size must be a whole number", "2.0"),
    "chunk_size a string": (rollout("chunk_size", "2"), "config.json", "chunk_size must be a whole number", "'2'"),
    "chunk_size 0": (rollout("chunk_size", 0), "config.json", "chunk_size must be a whole number of at least 1"),
    "chunk_size null": (rollout("chunk_size", None), "config.json", "chunk_size must be a whole number", "None"),
    "steps a float": (rollout("steps", 2.5), "config.json", "steps must be a whole number from 1 to 1000, got 2.5"),
    "steps 0": (rollout("steps", 0), "config.json", "steps must be a whole number from 1 to 1000, got 0"),
    "steps beyond memory": (rollout("steps", 10**12), "config.json", "steps must be a whole number from 1 to 1000"),
    "window 1": (rollout("window", 1), "config.json", "window must be a whole number of at least 2, got 1"),
    "window a float": (rollout("window", 4.5), "config.json", "window must be a whole number", "4.5"),
    "interleave missing": (rollout("interleave", GONE), Accepted("of a checkpoint from before the field")),
    "reuse_keys missing": (rollout("reuse_keys", GONE), Accepted("of a checkpoint from before the field")),
    "reuse_keys a number": (rollout("reuse_keys", 1), "config.json", "reuse_keys must be True or False, got 1"),
    "lookahead 0": (rollout("lookahead", 0), "config.json", "lookahead must be a whole number of at least 1"),
    "lookahead beyond memory": (rollout("lookahead", 10**12), "lookahead=1000000000000", "more than the"),
    "video_shift a string": (rollout("video_shift", "5"), "config.json", "video_shift must be a number", "'5'"),
    "video_shift 0": (rollout("video_shift", 0), "config.json", "video_shift must be a number from 0.001 to 1000"),
    "video_shift NaN": (rollout("video_shift", float("nan")), "config.json", "video_shift must be a number", "nan"),
    "action_shift Infinity": (rollout("action_shift", float("inf")), "config.json", "action_shift must be", "inf"),
    "guidance negative": (rollout("guidance", -1), "config.json", "guidance must be a finite number of at least 0"),
    "guidance a string": (rollout("guidance", "1"), "config.json", "guidance must be a finite number", "'1'"),
    "program unknown": (rollout("program", "waltz"), "config.json", "program must be one of", "'waltz'"),
    "program a number": (rollout("program", 7), "config.json", "program must be one of", "got 7"),
    "history unknown": (rollout("history", "none"), "config.json", "history must be one of", "'none'"),
    "cache unknown": (rollout("cache", ["persistent"]), "config.json", "cache must be one of", "['persistent']"),
    "camera a list": (saved("metadata.camera", [1]), "config.json: metadata.camera: must be an object of fields"),
    "camera missing field": (saved("metadata.camera.width", GONE), "metadata.camera: missing fields ['width']"),
    "camera of no size": (saved("metadata.camera.height", 0), "config.json", "height must be a whole number", "got 0"),
    "camera without a name": (saved("metadata.camera.name", 3), "config.json", "name must be a string, got 3"),
    "camera of another size": (saved("metadata.camera.height", 64), "64 x 64"),
    "codec null": (saved("metadata.codec", None), "config.json: metadata.codec must have", "got None"),
    "codec kind unknown": (saved("metadata.codec.kind", "jpeg"), "config.json: metadata.codec must have", "'jpeg'"),
    "codec kind a list": (saved("metadata.codec.kind", []), "config.json: metadata.codec must have", "'kind': []"),
    "codec config null": (saved("metadata.codec.config", None), Accepted("the tensors of PatchPCA say all about it")),
    "save a number": (saved("save", 7), "config.json: save must hold an id", "got 7"),
    "save id a path": (saved("save.id", "../../etc"), "config.json: save must hold an id", "../../etc"),
    "save id another": (saved("save.id", "0" * 16), "checkpoint mixes files of different saves"),
    "cuda_graphs a number": (rollout("cuda_graphs", 1), "config.json", "cuda_graphs must be True or False, got 1"),
}


def flipped(old):
    """A bit of the mantissa of the first weight, behind the header, whose length the file begins with."""
    place = 8 + int.from_bytes(old[:8], "little")
    return old[:place] + bytes([old[place] ^ 1]) + old[place + 1 :]


def header(text):
    return len(text).to_bytes(8, "little") + text


UNREADABLE = {
    "empty": b"",
    "truncated": lambda old: old[: len(old) // 2],
    "one byte short": lambda old: old[:-1],
    "bytes behind the end": lambda old: old + b"more",
    "no tensors": b"not tensors at all",
    "a header beyond the end": b"\xff" * 8 + b"{}",
    "a header of garbage": header(b"{garbage}"),
    "a header of other types": header(b'{"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}') + b"0000",
    "a pickle": b"\x80\x04K\x01.",
    "missing": GONE,
}
FILES = {
    f"{name.rpartition('/')[2]} {kind}": (raw(name, data), name.rpartition("/")[2])
    for name in (MODEL, EXTRA)
    for kind, data in UNREADABLE.items()
} | {
    "model.safetensors a folder": (cases.directory(MODEL), "model.safetensors"),
    "extra.safetensors a folder": (cases.directory(EXTRA), "extra.safetensors"),
    "no folder": (cases.removed("run/checkpoint"), "checkpoint", "No such file"),
}

WEIGHTS = {
    "NaN in one": (tensor(MODEL, HIDDEN, with_value(5, float("nan"))), "model.safetensors", HIDDEN, "finite"),
    "Inf in one": (tensor(MODEL, BIAS, with_value(0, float("-inf"))), "model.safetensors", BIAS, "finite"),
    "NaN everywhere": (every_tensor(MODEL, lambda t: t * float("nan")), "model.safetensors", "finite"),
    "beyond float32": (tensor(MODEL, BIAS, lambda t: t.double() + 1e300), "model.safetensors", BIAS, "finite"),
    "int32": (tensor(MODEL, HIDDEN, torch.Tensor.int), "model.safetensors", HIDDEN, "int32"),
    "all int32": (every_tensor(MODEL, torch.Tensor.int), "model.safetensors", "int32"),
    "bool": (tensor(MODEL, HIDDEN, torch.Tensor.bool), "model.safetensors", HIDDEN, "bool"),
    "uint8": (tensor(MODEL, HIDDEN, torch.Tensor.byte), "model.safetensors", HIDDEN, "uint8"),
    "complex": (tensor(MODEL, HIDDEN, lambda t: t + 0j), "model.safetensors", HIDDEN, "complex64"),
    "another shape": (tensor(MODEL, BIAS, lambda t: t[:-1]), "model.safetensors", BIAS, "expected [192], got [191]"),
    "another rank": (tensor(MODEL, HIDDEN, torch.Tensor.flatten), "model.safetensors", "expected [32, 32], got [1024]"),
    "no numbers": (tensor(MODEL, BIAS, torch.zeros(0)), "model.safetensors", "expected [192], got [0]"),
    "one missing": (tensor(MODEL, BIAS, GONE), "model.safetensors", "missing keys", BIAS),
    "all missing": (raw(MODEL, safetensors.torch.save({})), "model.safetensors", "missing keys", "more"),
    "one left over": (tensor(MODEL, "core.more", torch.zeros(2)), "model.safetensors", "core.more"),
    "bf16": (every_tensor(MODEL, torch.Tensor.bfloat16), Accepted("stored in fewer bits; the model is float32 again")),
    "float64": (every_tensor(MODEL, torch.Tensor.double), Accepted("stored in more bits; rounds to the same model")),
    "a flipped bit": (raw(MODEL, flipped), Accepted("any number could be a weight; there is no checksum")),
    "zeros": (tensor(MODEL, BIAS, torch.zeros_like), Accepted("a weight may be 0, and most start so")),
}

INDEX = MODEL + ".index.json"
SHARDS = ("one.safetensors", "two.safetensors")


def shards(damage=cases.nothing):
    """The weights in two files, with an index of them; and damage to these."""

    def cut(folder):
        tensors = sorted(safetensors.torch.load_file(folder / MODEL).items())
        halves = dict(tensors[::2]), dict(tensors[1::2])
        for name, half in zip(SHARDS, halves, strict=True):
            cases.put(folder / cases.CHECKPOINT / name, safetensors.torch.save(half))
        index = {"weight_map": {key: name for name, half in zip(SHARDS, halves, strict=True) for key in half}}
        (folder / INDEX).write_text(json.dumps(index))
        (folder / MODEL).unlink()
        damage(folder)

    return cut


def listed(where, value):
    return shards(cases.entry(INDEX, where, value))


ONE = cases.CHECKPOINT + SHARDS[0]
SHARDED = {
    "sound": (shards(), Accepted("as large checkpoints come")),
    "index empty": (shards(raw(INDEX, b"")), "index.json: not valid JSON"),
    "index a list": (shards(raw(INDEX, b"[]")), "index.json: must hold a weight_map"),
    "index missing": (shards(raw(INDEX, GONE)), "model.safetensors", "No such file"),
    "map missing": (listed("weight_map", GONE), "index.json: must hold a weight_map"),
    "map a list": (listed("weight_map", ["one.safetensors"]), "index.json: must hold a weight_map"),
    "map to numbers": (listed(("weight_map", BIAS), 1), "index.json: weight_map must name files", "1"),
    "map elsewhere": (listed(("weight_map", BIAS), "../one.safetensors"), "index.json: weight_map must name files"),
    "map to none": (listed(("weight_map", BIAS), "three.safetensors"), "1 of 3 shards are missing", "three"),
    "map to another": (listed(("weight_map", "core.more"), SHARDS[0]), "one.safetensors: holds other", "core.more"),
    "map without one": (listed(("weight_map", BIAS), GONE), "safetensors: holds other tensors", BIAS),
    "shard missing": (shards(raw(ONE, GONE)), "index.json: 1 of 2 shards are missing", "one.safetensors"),
    "shard truncated": (shards(raw(ONE, lambda old: old[:-4])), "one.safetensors"),
    "shard with NaN": (shards(every_tensor(ONE, lambda t: t * float("nan"))), "model.safetensors", "finite"),
}  # fmt: skip

ACTION = {
    "action_std missing": (tensor(EXTRA, "action_std", GONE), "extra.safetensors", "['action_std']"),
    "action_std short": (tensor(EXTRA, "action_std", lambda t: t[:3]), "extra.safetensors", "action_std", "[7]", "[3]"),
    "action_std a matrix": (
        tensor(EXTRA, "action_std", lambda t: t[None]),
        "extra.safetensors",
        "action_std",
        "[1, 7]",
    ),
    "action_std a number": (tensor(EXTRA, "action_std", torch.tensor(1.0)), "extra.safetensors", "action_std", "got"),
    "action_std zeros": (
        tensor(EXTRA, "action_std", torch.zeros(7)),
        "extra.safetensors",
        "action_std must be at least",
    ),
    "action_std one 0": (
        tensor(EXTRA, "action_std", with_value(2, 0)),
        "extra.safetensors",
        "action_std must be at least",
    ),
    "action_std NaN": (
        tensor(EXTRA, "action_std", with_value(2, float("nan"))),
        "extra.safetensors",
        "action_std",
        "nan",
    ),
    "action_std Inf": (
        tensor(EXTRA, "action_std", with_value(2, float("inf"))),
        "extra.safetensors",
        "action_std",
        "inf",
    ),
    "action_std negative": (tensor(EXTRA, "action_std", torch.neg), "extra.safetensors", "action_std must be at least"),
    "action_std int32": (tensor(EXTRA, "action_std", torch.Tensor.int), "extra.safetensors", "action_std", "int32"),
    "action_std float64": (
        tensor(EXTRA, "action_std", torch.Tensor.double),
        "extra.safetensors",
        "action_std",
        "float64",
    ),
    "action_mean missing": (tensor(EXTRA, "action_mean", GONE), "extra.safetensors", "['action_mean']"),
    "action_mean long": (tensor(EXTRA, "action_mean", torch.zeros(8)), "extra.safetensors", "action_mean", "[8]"),
    "action_mean NaN": (
        tensor(EXTRA, "action_mean", with_value(0, float("nan"))),
        "extra.safetensors",
        "action_mean",
        "nan",
    ),
    "varying missing": (tensor(EXTRA, "varying", GONE), "extra.safetensors", "['varying']"),
    "varying float": (tensor(EXTRA, "varying", torch.Tensor.float), "extra.safetensors", "varying", "torch.float32"),
    "varying uint8": (tensor(EXTRA, "varying", torch.Tensor.byte), "extra.safetensors", "varying", "torch.uint8"),
    "varying nowhere": (
        tensor(EXTRA, "varying", torch.zeros(7).bool()),
        Accepted("so it is of data that stands still"),
    ),
    "varying long": (tensor(EXTRA, "varying", torch.ones(9).bool()), "extra.safetensors", "varying", "[9]"),
}
CODEC = {
    "codec missing": (tensor(EXTRA, "codec.mean", GONE), "extra.safetensors", "keys are ['basis', 'scale']"),
    "codec further": (tensor(EXTRA, "codec.more", torch.zeros(1)), "extra.safetensors", "'more'"),
    "mean short": (tensor(EXTRA, "codec.mean", lambda t: t[1:]), "extra.safetensors", "mean has shape (767,)"),
    "mean empty": (tensor(EXTRA, "codec.mean", torch.zeros(0)), "extra.safetensors", "mean has shape (0,)"),
    "mean of another patch": (tensor(EXTRA, "codec.mean", torch.zeros(192)), "extra.safetensors", "mean (192,)"),
    "mean NaN": (tensor(EXTRA, "codec.mean", with_value(9, float("nan"))), "extra.safetensors", "mean must be finite"),
    "mean of bytes": (tensor(EXTRA, "codec.mean", lambda t: t * 255), "extra.safetensors", "mean must be of pixels"),
    "mean int32": (tensor(EXTRA, "codec.mean", torch.Tensor.int), "extra.safetensors", "mean must be", "int32"),
    "basis transposed": (tensor(EXTRA, "codec.basis", torch.t), "extra.safetensors", "basis (768, 48)"),
    "basis of fewer": (tensor(EXTRA, "codec.basis", lambda t: t[:40]), "extra.safetensors", "basis (40, 768)"),
    "basis Inf": (
        tensor(EXTRA, "codec.basis", with_value(9, float("inf"))),
        "extra.safetensors",
        "basis must be finite",
    ),
    "basis zeros": (tensor(EXTRA, "codec.basis", torch.zeros_like), "extra.safetensors", "basis", "orthonormal"),
    "scale missing": (tensor(EXTRA, "codec.scale", GONE), "extra.safetensors", "keys are ['basis', 'mean']"),
    "scale short": (tensor(EXTRA, "codec.scale", lambda t: t[:5]), "extra.safetensors", "scale (5,)"),
    "scale 0": (
        tensor(EXTRA, "codec.scale", with_value(3, 0)),
        "extra.safetensors",
        "scale must be from 1e-12 to 1e12, got 0 to",
    ),
    "scale negative": (tensor(EXTRA, "codec.scale", torch.neg), "extra.safetensors", "scale must be from", "got -"),
    "scale denormal": (
        tensor(EXTRA, "codec.scale", lambda t: t * 1e-42),
        "extra.safetensors",
        "scale must be from",
    ),
    "basis huge": (tensor(EXTRA, "codec.basis", lambda t: t * 1e38), "extra.safetensors", "basis", "orthonormal"),
    "scale NaN": (
        tensor(EXTRA, "codec.scale", with_value(0, float("nan"))),
        "extra.safetensors",
        "scale must be finite",
    ),
}
TEXT = {
    "words missing": (
        tensor(EXTRA, "text.words.weight", GONE),
        "extra.safetensors",
        "missing keys",
        "text.words.weight",
    ),
    "words NaN": (
        tensor(EXTRA, "text.words.weight", with_value(0, float("nan"))),
        "extra.safetensors",
        "text.words",
        "finite",
    ),
    "words int64": (tensor(EXTRA, "text.words.weight", torch.Tensor.long), "extra.safetensors", "text.words", "int64"),
    "words of another width": (
        tensor(EXTRA, "text.words.weight", torch.zeros(3, 9)),
        "extra.safetensors",
        "got [3, 9]",
    ),
    "places missing": (tensor(EXTRA, "text.places", GONE), "extra.safetensors", "missing keys", "text.places"),
    "places Inf": (
        tensor(EXTRA, "text.places", with_value(0, float("inf"))),
        "extra.safetensors",
        "text.places",
        "finite",
    ),
    "text further": (tensor(EXTRA, "text.more", torch.zeros(1)), "extra.safetensors", "text.more"),
    "bf16": (tensor(EXTRA, "text.places", torch.Tensor.bfloat16), Accepted("stored in fewer bits, as weights may be")),
    "a further tensor": (tensor(EXTRA, "more", torch.zeros(1)), Accepted("nothing reads it; others may keep theirs")),
}
OTHERS = {
    "nothing": (cases.nothing, Accepted("the sound checkpoint itself")),
    "training damaged": (raw(f"{STATE}/.metadata", b"damaged"), Accepted("a rollout does not read it")),
    "training missing": (cases.removed(STATE), Accepted("a rollout does not read it")),
    "a further file": (raw(cases.CHECKPOINT + "notes.txt", b"mine"), Accepted("a user's notes may lie there")),
}
TABLE = {
    f"{part}: {name}": row
    for part, rows in (
        ("config", CONFIG),
        ("file", FILES),
        ("weights", WEIGHTS),
        ("shards", SHARDED),
        ("action", ACTION),
        ("codec", CODEC),
        ("text", TEXT),
        ("others", OTHERS),
    )
    for name, row in rows.items()
}


@pytest.mark.parametrize("damage, words", [(row[0], row[1:]) for row in TABLE.values()], ids=TABLE)
def test_rollout_from_a_damaged_checkpoint(damage, words, folder, capsys):
    cases.check(folder, capsys, ROLLOUT, damage, words)

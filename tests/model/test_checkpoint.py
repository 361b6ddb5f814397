"""Configs, strict loading, checkpoint folders, the text slot, the public names."""

import copy
import dataclasses
import errno
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import wam_models
from wam_models import (
    ModelConfig,
    WordEmbedding,
    WorldActionModel,
    demo_config,
    from_diffusers,
    golden_config,
    load_checkpoint,
    load_weights,
    read_weights,
    save_checkpoint,
    umt5_encoder,
    wan_5b_config,
    wan_5b_small_action_config,
)
from wam_models.training_state import TrainingState

from .cases import META, golden_model, weights

SMALL = dataclasses.replace(golden_config(), text_dim=8, freq_dim=16)


def test_golden_config_is_that_of_the_recording():
    shared = {k: v for k, v in golden_config().to_dict().items() if k in META}
    assert len(shared) >= 11 and all(META[k] == v for k, v in shared.items())


def test_sizes():
    with torch.device("meta"):
        models = [WorldActionModel(c()) for c in (demo_config, wan_5b_config, wan_5b_small_action_config)]
    demo, large, small_action = (sum(p.numel() for p in m.parameters()) for m in models)
    assert 2e6 < demo < 4e6
    assert 7e9 < large < 8.5e9 and 5e9 < small_action < 6e9
    for model in models:
        assert 0.9 < model.config.matrices / sum(p.numel() for p in model.parameters() if p.ndim == 2) <= 1
    assert models[1].config.rope_split == (44, 42, 42) and golden_config().rope_split == (12, 10, 10)


def test_config_round_trip_and_refusals():
    values = json.loads(json.dumps(demo_config().to_dict()))
    assert ModelConfig.from_dict(values) == demo_config()
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\], missing fields \['ffn'\]"):
        ModelConfig.from_dict({k: v for k, v in values.items() if k != "ffn"} | {"colour": 1})
    for change in ({"heads": 0}, {"hidden": 2.5}, {"head_dim": 7}, {"patch": (2, 2, 2)}, {"eps": 0}, {"ffn": True}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(demo_config(), **change)


def test_loading_is_strict_and_reports_what_it_leaves():
    model = WorldActionModel(golden_config())
    unused = load_weights(model, weights())
    assert len(unused) == 25
    assert all(k.startswith(("core.action_", "core.runtime_", "action_expert.hidden_context_proj")) for k in unused)
    assert set(model.state_dict()) <= set(weights())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    broken = dict(weights())
    del broken["core.proj_out.bias"]
    broken["core.text_proj.linear_1.weight"] = torch.zeros(3, 4)
    with pytest.raises(
        ValueError, match=r"core\.proj_out\.bias.*linear_1\.weight: expected \[64, 4096\], got \[3, 4\]"
    ):
        load_weights(model, broken)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_diffusers_names_cover_the_video_expert():
    ours = golden_model().state_dict()
    video = {k: v for k, v in ours.items() if ".video_block." in k or k.startswith("core.")}
    theirs = {}
    for key, value in video.items():
        key = key.replace("packed_block_stack.packed_blocks", "blocks").replace("video_block.", "")
        key = key.replace("core.text_proj", "condition_embedder.text_embedder")
        key = key.replace("core.time_conditioner", "condition_embedder").removeprefix("core.")
        if key.startswith("patch_embedding_mlp"):
            key = key.replace("_mlp", "")
            value = value.unflatten(-1, (48, 1, 2, 2)) if key.endswith("weight") else value
        theirs[key] = value
    assert "blocks.0.attn1.to_q.weight" in theirs and "patch_embedding.weight" in theirs
    back = from_diffusers(theirs)
    assert set(back) == set(video) and all(torch.equal(back[k], video[k]) for k in video)


def test_checkpoint_folder_round_trip(tmp_path):
    model, text = WorldActionModel(SMALL), WordEmbedding.from_instructions(["Pick up the soup"], 8)
    generator = torch.Generator().manual_seed(4)
    training = TrainingState({"generator": generator.get_state()}, {"step": 7})
    codec = {"codec.mean": torch.randn(48)}
    metadata = {"program": "joint", "scale": 1.5}
    save_checkpoint(tmp_path / "a", model, text=text, extra=codec, metadata=metadata, training_state=training)
    back = load_checkpoint(tmp_path / "a")
    assert back.model.config == SMALL and back.metadata == metadata and not back.model.training
    assert all(torch.equal(v, back.model.state_dict()[k]) for k, v in model.state_dict().items())
    assert set(back.extra) == {"codec.mean"} and torch.equal(back.extra["codec.mean"], codec["codec.mean"])
    assert torch.equal(back.text(["pick the spoon"]), text(["pick the spoon"]))
    assert back.training_state.values == {"step": 7}
    found = {"generator": torch.zeros_like(generator.get_state())}
    back.training_state.read(found)
    assert torch.equal(found["generator"], generator.get_state())
    save_checkpoint(tmp_path / "a", model)
    again = load_checkpoint(tmp_path / "a")
    assert again.training_state is None and again.text is None and again.extra == {}
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json",
        "extra.safetensors",
        "model.safetensors",
    ]


def test_broken_checkpoint_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="must not start with"):
        save_checkpoint(tmp_path, WorldActionModel(SMALL), extra={"text.words": torch.zeros(1)})
    save_checkpoint(tmp_path, WorldActionModel(SMALL))
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="'model' entry"):
        load_checkpoint(tmp_path)


TINY = ModelConfig(
    hidden=8, heads=1, head_dim=6, layers=1, ffn=8, action_hidden=8, action_ffn=8, action_dim=1, actions_per_frame=1,
    latent_channels=1, text_dim=1, freq_dim=2,
)  # fmt: skip
FILES = ["config.json", "extra.safetensors", "model.safetensors", "training"]


@cache
def tiny_model():
    return WorldActionModel(TINY)


def save(folder, step, *, training=True, size=1):
    """A save whose four files all hold the step."""
    model = tiny_model()
    torch.nn.init.constant_(model.core.proj_out.bias, step)
    state = TrainingState({"size": torch.zeros(size)}, {"step": step}) if training else None
    metadata = {"step": step, "training": training}
    save_checkpoint(folder, model, extra={"step": torch.tensor(step)}, metadata=metadata, training_state=state)


def step_of(folder):
    """The step of a whole checkpoint; its training state is there if it should be."""
    found = load_checkpoint(folder)
    step = found.metadata["step"]
    assert int(found.model.core.proj_out.bias[0]) == int(found.extra["step"]) == step
    state = found.training_state
    assert (state and state.values["step"]) == (step if found.metadata["training"] else None)
    if state is not None:
        try:
            state.read({"size": torch.ones(state.sizes["size"])})
        except ValueError:  # beside saves, of which one has come meanwhile
            assert load_checkpoint(folder).save_id != found.save_id
    return step


def fork(work, hook=None):
    """Runs ``work`` in a child; returns its process id. ``hook`` is told of what Python does, before it does it."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)  # OpenMP's other threads are not in the child, which would wait for them
        if hook is not None:
            sys.addaudithook(hook)
        work()
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


def at_operation(number, folder, act):
    """A hook that calls ``act`` before the n-th operation on files under the folder; counts from 0."""
    seen = iter(range(10**6))

    def hook(event, args):
        files = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod")
        if event in files and str(args[0]).startswith(str(folder)) and next(seen) >= number:
            act(event, args)

    return hook


@pytest.fixture
def no_wait(monkeypatch):
    """A kill does not take what the operating system holds, so the disk needs not be waited for."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def killed(folder, work, number):
    """Whether ``work`` lived long enough to be killed before its n-th operation on files of the folder."""
    hook = at_operation(number, folder, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    _, status = os.waitpid(fork(work, hook), 0)
    assert status == 0 or os.WIFSIGNALED(status)
    return status != 0


@pytest.mark.parametrize("training", [True, False])
def test_a_save_that_is_killed_anywhere_is_all_old_or_all_new(training, tmp_path, no_wait):
    save(tmp_path, 0)
    committed = 0
    for number in itertools.count():
        old, new = 2 * number, 2 * number + 1
        if not killed(tmp_path, partial(save, tmp_path, new, training=training), number):
            break
        found = step_of(tmp_path)
        committed += found == new
        assert found == (new if committed else old)
        save(tmp_path, new + 1)  # over whatever is left
        assert sorted(os.listdir(tmp_path)) == FILES
    assert number >= 20 and committed >= 5


def test_a_first_save_that_is_killed_anywhere_is_whole_or_nothing(tmp_path, no_wait):
    committed = 0
    for number in itertools.count():
        folder = tmp_path / str(number)
        if not killed(folder, partial(save, folder, 1), number):
            break
        committed += (folder / "config.json").exists()
        if committed:
            assert step_of(folder) == 1
        save(folder, 2)
        assert step_of(folder) == 2 and sorted(os.listdir(folder)) == FILES
    assert number >= 20 and committed >= 5


def test_28_kills_while_saving_and_reading(tmp_path, no_wait):
    draw = random.Random(0)

    def work(first):
        for step in itertools.count(first):
            save(tmp_path, step, size=draw.choice([1, 10**5]))
            time.sleep(0.1)  # else a reader, which takes as long as a save, is always overtaken

    save(tmp_path, 0)
    last = 0
    for _ in range(28):
        child = fork(partial(work, last + 1))
        seen = [step_of(tmp_path)]
        while seen[-1] == last and len(seen) < 10_000:  # a reader beside the saves, until one is done
            seen.append(step_of(tmp_path))
        seen += [step_of(tmp_path) for _ in range(draw.randrange(4))]
        assert seen == sorted(seen)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        last = step_of(tmp_path)
    assert last >= 28
    save(tmp_path, last + 1)
    assert sorted(os.listdir(tmp_path)) == FILES


def test_nothing_replaces_an_old_file_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """After a power cut there is what was waited for."""
    synced, moved = [], []
    real = os.fsync, os.replace

    def sync(handle):
        synced.append(os.fstat(handle).st_ino)
        real[0](handle)

    def move(source, target):
        source, target = Path(source), Path(target)
        assert {source.stat().st_ino, source.parent.stat().st_ino} <= set(synced)
        if moved:  # what made it the checkpoint is there too
            assert tmp_path.stat().st_ino in synced
        moved.append(target.name)
        real[1](source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", move)
    save(tmp_path, 1)
    assert moved[0] == "config.json" and sorted(moved) == FILES


def test_a_full_disk_costs_neither_the_checkpoint_nor_space(tmp_path, no_wait):
    def refuse(event, args):
        path, mode, flags = args if event == "open" else (None, None, 0)
        if event == "os.mkdir" or (event == "open" and ((mode and mode != "r") or flags & (os.O_WRONLY | os.O_CREAT))):
            raise OSError(errno.ENOSPC, "No space left on device", path)

    def work():
        try:
            save(tmp_path, 2)
        except OSError as error:
            assert "No space left on device" in str(error)
        else:
            os._exit(7)

    save(tmp_path, 1)
    failures = 0
    for number in range(1000):
        _, status = os.waitpid(fork(work, at_operation(number, tmp_path, refuse)), 0)
        if os.waitstatus_to_exitcode(status) == 7:
            break
        failures += 1
        assert status == 0 and step_of(tmp_path) == 1 and sorted(os.listdir(tmp_path)) == FILES
    assert failures >= 8 and step_of(tmp_path) == 2


@pytest.mark.parametrize("limit, name", [(50, "model.safetensors"), (50_000, "training")])
def test_a_file_that_is_cut_short_is_named(limit, name, tmp_path):
    """The operating system refuses to let a file grow, half way through it."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError, match=f"cannot write {name} to .*: File too large; what was there"):
            save(tmp_path, 2, size=10**5)

    save(tmp_path, 1)
    assert os.waitpid(fork(work), 0)[1] == 0
    assert step_of(tmp_path) == 1 and sorted(os.listdir(tmp_path)) == FILES


@pytest.mark.parametrize("name", FILES)
def test_files_of_different_saves_are_refused(name, tmp_path):
    for step in (1, 2):
        save(tmp_path / str(step), step)
    if name == "training":
        shutil.rmtree(tmp_path / "2" / name)
    (tmp_path / "1" / name).replace(tmp_path / "2" / name)
    with pytest.raises(ValueError, match="mixes files of different saves") as error:
        load_checkpoint(tmp_path / "2")
    assert name in str(error.value)
    if name == "training":
        assert load_checkpoint(tmp_path / "2", training=False).metadata["step"] == 2


def without_ids(folder):
    """As an older version wrote it."""
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path)
    config = json.loads((folder / "config.json").read_text())
    del config["save"]
    (folder / "config.json").write_text(json.dumps(config))
    values = json.loads((folder / "training/values.json").read_text())
    del values["save_id"]
    (folder / "training/values.json").write_text(json.dumps(values))


def test_folders_without_ids_still_load(tmp_path):
    save(tmp_path / "old", 1)
    without_ids(tmp_path / "old")
    assert step_of(tmp_path / "old") == 1 and load_checkpoint(tmp_path / "old").save_id is None
    for name, where in (("training/values.json", "training"), ("model.safetensors", "model.safetensors")):
        save(tmp_path / "new", 2)
        (tmp_path / "new" / name).write_bytes((tmp_path / "old" / name).read_bytes())
        with pytest.raises(ValueError, match=f"{where} is of save without id"):
            load_checkpoint(tmp_path / "new")
    # weights that another tool wrote are taken, but no training goes on from them
    assert load_checkpoint(tmp_path / "new", training=False).metadata["step"] == 2
    for name in ("model.safetensors.part", "config.json.part"):  # an older version was killed
        (tmp_path / "old" / name).write_text("half")
    save(tmp_path / "old", 2)
    assert step_of(tmp_path / "old") == 2 and sorted(os.listdir(tmp_path / "old")) == FILES


def test_what_cannot_be_saved_is_noticed_first(tmp_path):
    save(tmp_path / "a", 1)
    model = tiny_model()
    for options, error in (
        ({"metadata": {"scale": torch.ones(1)}}, TypeError),
        ({"extra": {"mean": [1.0]}}, TypeError),
        ({"extra": {"text.words": torch.zeros(1)}}, ValueError),
        ({"training_state": TrainingState({}, {"save_id": 1})}, ValueError),
        ({"training_state": TrainingState({}, {"step": torch.ones(1)})}, TypeError),
    ):
        for folder in ("a", "b"):
            with pytest.raises(error):
                save_checkpoint(tmp_path / folder, model, **options)
    lost = copy.deepcopy(model)
    torch.nn.init.constant_(lost.core.proj_out.bias, math.inf)
    with pytest.raises(ValueError, match=r"save_checkpoint: core.proj_out.bias must hold finite numbers, got 4 others"):
        save_checkpoint(tmp_path / "a", lost)
    assert step_of(tmp_path / "a") == 1 and sorted(os.listdir(tmp_path / "a")) == FILES
    assert not (tmp_path / "b").exists()


def test_a_folder_may_be_a_link_and_hold_other_files(tmp_path, monkeypatch):
    (tmp_path / "real" / "notes.part").mkdir(parents=True)
    (tmp_path / "real" / "film.gif").write_text("mine")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    for step, folder in enumerate(("link", "link/", "./link/../link")):
        save(folder, step)
        assert step_of(tmp_path / "real") == step_of(folder) == step
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir("real")) == sorted([*FILES, "film.gif", "notes.part"])
    modes = {path.stat().st_mode for path in (tmp_path / "real").rglob("*") if path.is_file() and path.suffix != ".gif"}
    assert len(modes) == 1


def test_tensors_that_share_memory_are_saved(tmp_path):
    both = torch.arange(6.0)
    shared = {"whole": both, "same": both, "part": both[2:4], "turned": both.view(2, 3).T}
    save_checkpoint(tmp_path, tiny_model(), extra=shared)
    back = load_checkpoint(tmp_path).extra
    assert set(back) == set(shared) and all(torch.equal(back[k], v) for k, v in shared.items())


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.model.", "_fsdp_wrapped_module."],
)
def test_names_behind_a_prefix_are_recognised(prefix):
    state = {prefix + k: v for k, v in tiny_model().state_dict().items()}
    model = WorldActionModel(TINY)
    assert load_weights(model, state | {prefix + "spare": torch.zeros(1)}) == [prefix + "spare"]
    assert all(torch.equal(v, state[prefix + k]) for k, v in model.state_dict().items())
    if not set(prefix.split(".")) & {"_orig_mod", "_fsdp_wrapped_module"}:  # these stand for nothing else
        with pytest.raises(ValueError, match=f"missing keys .* more.* behind \\['{prefix}'\\], beside others") as error:
            load_weights(model, state | {"loss.scale": torch.zeros(1)})
        assert len(str(error.value)) < 700


def test_weights_pass_between_wrapped_models(tmp_path):
    def wrapped():
        model = WorldActionModel(TINY)
        block = model.packed_block_stack.packed_blocks[0]
        model.packed_block_stack.packed_blocks[0] = checkpoint_wrapper(block)
        model.action_expert = torch.compile(model.action_expert)
        return model

    state = tiny_model().state_dict()
    assert set(wrapped().state_dict()) != set(state)
    for model in (wrapped(), torch.compile(WorldActionModel(TINY)), torch.nn.DataParallel(wrapped())):
        assert load_weights(model, state) == []
        assert load_weights(WorldActionModel(TINY), model.state_dict()) == []
        save_checkpoint(tmp_path, model)
        back = load_checkpoint(tmp_path).model.state_dict()
        assert all(torch.equal(v, back[k]) for k, v in state.items())


def test_a_model_on_the_meta_device_is_filled():
    state = tiny_model().bfloat16().state_dict()
    tiny_model().float()
    with torch.device("meta"):
        model = WorldActionModel(TINY)
    state["core.proj_out.weight"] = state["core.proj_out.weight"].T.contiguous().T
    model.core.requires_grad_(False)
    model.action_expert.to_empty(device="cpu")
    kept = model.action_expert.action_proj_out.weight
    with torch.inference_mode():
        assert load_weights(model, state) == []
    for name, value in model.named_parameters():
        assert torch.equal(value, state[name].float()) and not value.is_inference()
        assert value.requires_grad != name.startswith("core.") and value.data_ptr() != state[name].data_ptr()
    assert model.action_expert.action_proj_out.weight is kept  # as an optimizer may hold it
    assert model.core.proj_out.weight.is_contiguous()
    with torch.device("meta"):
        model.register_buffer("table", torch.zeros(1), persistent=False)
    with pytest.raises(ValueError, match=r"no state dict holds the model's \['table'\]"):
        load_weights(model, state)


class Sharded(torch.Tensor):
    """Looks like a DTensor."""

    full_tensor = None


def test_weights_that_are_not_here_are_refused(tmp_path):
    state = dict(tiny_model().state_dict())
    bias = state["core.proj_out.bias"]
    for value, message in (
        (bias.to("meta"), "is on the meta device"),
        (bias.as_subclass(Sharded), "is a DTensor"),
        (bias.tolist(), "expected a tensor, got list"),
    ):
        with pytest.raises(ValueError, match=rf"core\.proj_out\.bias: {message}"):
            load_weights(WorldActionModel(TINY), state | {"core.proj_out.bias": value})
    with pytest.raises(ValueError, match=r"state holds mappings, \['model'\]: pass one of them"):
        load_weights(tiny_model(), {"model": state, "step": 3})
    with pytest.raises(TypeError, match="state must map names to tensors, got PosixPath; see read_weights"):
        load_weights(tiny_model(), tmp_path)
    with torch.device("meta"):
        model = WorldActionModel(TINY)
    with pytest.raises(ValueError, match="save_checkpoint: core.* is on the meta device"):
        save_checkpoint(tmp_path, model)
    with pytest.raises(TypeError, match="must be a WorldActionModel, wrapped or not, got Linear"):
        save_checkpoint(tmp_path, torch.nn.Linear(2, 2))


def shard(folder, name, count=3):
    """Splits a file of tensors as diffusers and transformers do; returns the index."""
    tensors = load_file(folder / f"{name}.safetensors")
    (folder / f"{name}.safetensors").unlink()
    where = {}
    for number in range(count):
        part = {k: v for i, (k, v) in enumerate(tensors.items()) if i % count == number}
        file = f"{name}-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


def test_shards_are_followed(tmp_path):
    save(tmp_path, 1, training=False)
    whole = load_file(tmp_path / "model.safetensors")
    index = shard(tmp_path, "model")
    assert step_of(tmp_path) == 1
    save(tmp_path, 2)  # the shards are of no save any more
    assert step_of(tmp_path) == 2
    (tmp_path / "transformer").mkdir()
    for path in tmp_path.glob("model-*"):
        path.replace(tmp_path / "transformer" / path.name)
    index.replace(tmp_path / "transformer" / index.name)
    for path in (tmp_path / "transformer", tmp_path / "transformer" / index.name):
        found = read_weights(path)
        assert set(found) == set(whole) and all(torch.equal(v, found[k]) for k, v in whole.items())
    with pytest.raises(ValueError, match=r"must hold one index .* got \['extra.safetensors', 'model.safetensors'\]"):
        read_weights(tmp_path)
    assert set(read_weights(tmp_path / "extra.safetensors")) == {"step"}


def test_broken_shards_are_named(tmp_path):
    save(tmp_path, 1, training=False)
    index = shard(tmp_path, "model")
    listed = json.loads(index.read_text())
    first = "model-00001-of-00003.safetensors"

    def refused(change, *words):
        index.write_text(json.dumps(change(json.loads(json.dumps(listed)))))
        for read, path in ((load_checkpoint, tmp_path), (read_weights, index)):
            with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
                read(path)

    def moved(to, key="core.proj_out.bias"):
        return lambda held: held | {"weight_map": held["weight_map"] | {key: to}}

    refused(moved("../model-00001-of-00003.safetensors"), index.name, "files beside it", "'../model-")
    refused(moved("/etc/passwd"), index.name, "files beside it", "/etc/passwd")
    refused(moved("model-00009-of-00003.safetensors"), index.name, "1 of 4 shards are missing", "model-00009")
    refused(moved(first, "core.new"), first, "lacks ['core.new']")
    key = next(key for key, file in listed["weight_map"].items() if file != first)
    refused(moved(first, key), first, f"lacks ['{key}']")
    refused(lambda held: [], index.name, "must hold a weight_map")
    refused(lambda held: held | {"weight_map": {"a": 1}}, index.name, "files beside it", "1")
    refused(lambda held: held | {"weight_map": {}}, index.name, "must hold a weight_map")
    tensors = load_file(tmp_path / first)
    save_file(tensors, tmp_path / first, {"save_id": "0" * 16})
    refused(lambda held: held, index.name, "different saves")
    (tmp_path / first).write_bytes(b"half")
    refused(lambda held: held, first)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_is_loaded_in_any_mode_can_be_trained(mode, tmp_path):
    with mode():
        save(tmp_path, 1)
        found = load_checkpoint(tmp_path)
    tensors = [*found.model.parameters(), *found.extra.values()]
    assert not any(t.is_inference() for t in tensors) and next(found.model.parameters()).requires_grad


def test_word_embedding():
    text = WordEmbedding.from_instructions(["Pick up the red cup.", "open the drawer"], 8)
    assert text.vocabulary == ("cup", "drawer", "open", "pick", "red", "the", "up") and text.tokens == 5
    out = text(["open THE drawer", "open the drawer!", "lift the drawer", "drawer the open"])
    assert out.shape == (4, 5, 8) and torch.equal(out[0], out[1])
    assert not out[:, 3:].any() and out[:, :3].all()
    assert not torch.equal(out[0], out[2]) and not torch.equal(out[0], out[3])  # unknown words, and order, count
    assert torch.equal(text(["lift the"])[0, 0], text(["raise the"])[0, 0])
    out.sum().backward()
    assert text.words.weight.grad.any()
    with pytest.raises(ValueError, match="at most 5 words, got 6"):
        text(["a b c d e f"])
    with pytest.raises(ValueError, match="single lower-case words"):
        WordEmbedding(["Two words"], 8)


def test_umt5_needs_a_local_folder(tmp_path):
    with pytest.raises(ValueError, match="local folder"):
        umt5_encoder(tmp_path / "nothing")


def test_umt5_needs_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        umt5_encoder(tmp_path)


def test_public_names():
    assert wam_models.__all__ == sorted(wam_models.__all__)
    assert all(getattr(wam_models, name) is not None for name in wam_models.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = wam_models.nonsense
    code = "import sys, wam_models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

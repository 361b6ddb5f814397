"""Frozen components and LoRA adapters: what trains, what the optimizers hold, what a checkpoint keeps."""

import copy
import importlib
import json
import sys
from dataclasses import replace

import pytest
import torch

from wam_models import StepConfig, WorldActionModel, cli, training_step
from wam_models.data import ClipDataset
from wam_models.rollout.policy import Policy
from wam_models.train import TrainConfig, train
from wam_models.train.trainer import Trainer
from wam_models.weights.layouts import part_of
from wam_models.weights.parts import COMPONENTS, adapters_of, merged, named_by

CPU = torch.device("cpu")
LORA = {"frozen": ("video",), "lora": ("video.blocks", "core.proj_out"), "lora_rank": 3, "lora_scale": 2.0}


def needs_peft():
    pytest.importorskip("peft", reason="peft is in requirements/test.txt")


def held(trainer):
    """Ids of the parameters that the optimizers step."""
    return {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}


def run(trainer, steps=3):
    counted = iter(range(1, 100))
    return trainer.run(stop=lambda: next(counted) == steps, progress=False)


@pytest.mark.parametrize("frozen", [*COMPONENTS, "packed_block_stack.packed_blocks.0.action_block.attn1"])
def test_what_is_frozen_stays_and_the_rest_trains(frozen, config, data):
    trainer = Trainer(replace(config, frozen=(frozen,)), data, seed=0, device=CPU)
    before = copy.deepcopy(trainer.learner.state_dict())
    still = named_by([frozen], before, "")
    trains = {name: p for name, p in trainer.learner.named_parameters() if name not in still}
    assert still and held(trainer) == {id(p) for p in trains.values()}
    done = run(trainer)
    after = trainer.learner.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert not moved & still and len(moved) > 0.7 * len(trains)  # three steps do not draw every objective
    assert all(torch.equal(trainer.average[name], before[name]) for name in still)
    whole = run(Trainer(config, data, seed=0, device=CPU), 1)
    assert done.log[0]["loss"] == whole.log[0]["loss"] and done.log[0]["gradient"] <= whole.log[0]["gradient"]


def test_adapters_train_and_merge_as_peft_merges_them(config, data):
    needs_peft()
    trainer = Trainer(replace(config, **LORA), data, seed=0, device=CPU)
    before = copy.deepcopy(trainer.learner.state_dict())
    adapters = adapters_of(before)
    block = "model.packed_block_stack.packed_blocks.0.video_block."
    linears = [f"{block}{a}.{m}" for a in ("attn1", "attn2") for m in ("to_q", "to_k", "to_v", "to_out.0")]
    linears += [f"{block}ffn.net.0.proj", f"{block}ffn.net.2", "model.core.proj_out"]
    assert {name.partition(".lora_")[0] for name in adapters} == set(linears)
    assert all(value.shape[0 if "lora_A" in name else 1] == 3 for name, value in adapters.items())
    fresh = Trainer(config, data, seed=0, device=CPU).learner.state_dict()
    assert all(torch.equal(value, merged(before, 2.0)[name]) for name, value in fresh.items())  # B begins as 0
    done = run(trainer)
    after = trainer.learner.state_dict()
    video = named_by(["video"], fresh, "")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert set(adapters) <= moved and not {name.replace(".base_layer.", ".") for name in moved} & video
    policy = done.policy.model
    assert set(policy.state_dict()) == {name[6:] for name in fresh if name.startswith("model.")}
    # peft's own merge, of the averaged weights
    trainer.learner.load_state_dict(trainer.average)
    for module in trainer.learner.modules():
        if hasattr(module, "merge"):
            module.merge()
    theirs = trainer.learner.state_dict()
    for name, value in policy.state_dict().items():
        adapted = f"model.{name}".removesuffix("weight") + "base_layer.weight"
        key = adapted if adapted in theirs else f"model.{name}".replace(".bias", ".base_layer.bias")
        torch.testing.assert_close(value, theirs.get(key, theirs.get(f"model.{name}")), rtol=1e-6, atol=1e-7)


def test_a_resumed_run_with_adapters_goes_on_exactly(config, data, root, tmp_path):
    needs_peft()
    config = replace(config, **LORA)
    whole = train(config, data, seed=3, progress=False)
    rows = []
    cut = train(config, data, seed=3, out=tmp_path, stop=lambda: rows.append(0) or len(rows) == 5, progress=False)
    policy, found = Policy.load(tmp_path / "checkpoint")
    assert TrainConfig.from_dict(found.metadata["training"]["config"]) == config
    assert not adapters_of(policy.model.state_dict()) and adapters_of(found.training_state.sizes)
    folder = tmp_path / "adapters"
    assert (
        cli.main(["export", "--checkpoint", str(tmp_path / "checkpoint"), "--layout", "peft", "--out", str(folder)])
        == 0
    )
    base = WorldActionModel(config.model)
    names = [name for name in found.training_state.sizes if name.startswith("weights.model.")]
    held = found.training_state.held(names)
    held = {k.removeprefix("weights.model.").replace(".base_layer.", "."): v for k, v in held.items()}
    base.load_state_dict({k: v for k, v in held.items() if k in base.state_dict()})
    frozen = named_by(["video"], [f"model.{k}" for k in base.state_dict()], "")
    theirs = importlib.import_module("peft").PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    for name in (k.removeprefix("model.") for k in frozen):
        torch.testing.assert_close(policy.model.state_dict()[name], theirs[name], rtol=1e-6, atol=1e-7)
    again = ClipDataset(root, policy.codec)
    for change in ({"lora_rank": 2}, {"lora": ("video.blocks",)}):  # other adapters than it has
        with pytest.raises(ValueError, match=r"/training: .*lora_A"):
            train(replace(config, **change), again, resume=found, progress=False)
    rest = train(config, again, seed=99, resume=found, progress=False)
    for field in ("loss", "gradient"):
        assert [row[field] for row in cut.log + rest.log] == [row[field] for row in whole.log]
    for a, b in zip(whole.policy.model.parameters(), rest.policy.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_frozen_or_adapted_is_named(config, data, root, tmp_path, monkeypatch, capsys):
    for field, value, message in (
        ("frozen", ("vidoe",), "frozen must be some of .*, or modules of the model by name, got 'vidoe'"),
        ("frozen", ("video", "action", "words"), "frozen leaves nothing to train"),
        ("lora", ("core.scale_shift_table",), "lora must be of components with linear maps"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(replace(config, **{field: value}), data, seed=0, device=CPU)
    for values in ({"frozen": "video"}, {"lora": [1]}, {"lora_rank": 0}, {"lora_scale": 0}):
        with pytest.raises(ValueError, match=f"TrainConfig: {next(iter(values))}"):
            TrainConfig(**values)
    with pytest.raises(
        ValueError, match=r"without their other half or their linear map: \['a.lora_A.default.weight'\]"
    ):
        merged({"a.lora_A.default.weight": torch.zeros(1, 1)}, 1.0)
    monkeypatch.setitem(sys.modules, "peft", None)
    settings = tmp_path / "config.json"
    settings.write_text(json.dumps(replace(config, lora=("video",)).to_dict()))
    assert cli.main(["train", "--data", str(root), str(settings), "--out", str(tmp_path / "run")]) == 2
    assert "the Python package 'peft' is not installed" in capsys.readouterr().err
    assert cli.main(["train", str(settings), "--estimate"]) == 2
    assert "frozen and lora must be left out with --estimate" in capsys.readouterr().err


def test_the_stop_gradient_follows_what_is_frozen(config, data):
    def pairs(**changes):
        trainer = Trainer(replace(config, **changes), data, seed=0, device=CPU)
        (found,) = {kind.config.stop_gradient for kind in trainer.kinds}
        return found

    assert pairs() == pairs(frozen=("video.blocks",)) == pairs(frozen=("video",), stop_gradient=()) == ()
    assert pairs(frozen=("video",)) == (("action", "video"),)
    assert pairs(frozen=("action",)) == (("video", "action"),)
    assert pairs(stop_gradient=[["action", "video"]]) == (("action", "video"),)
    for wrong in ("video", [["action"]], [["action", "text"]], ["av"]):
        with pytest.raises(ValueError, match="TrainConfig: stop_gradient must be pairs"):
            replace(config, stop_gradient=wrong)


def test_the_video_gets_no_gradient_from_insulated_actions(config):
    """Of the action loss alone, where actions attend to the video and not the other way."""
    torch.manual_seed(0)
    model = WorldActionModel(replace(config.model, action_dim=2))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    channels = config.model.latent_channels
    batch = {"video": torch.randn(1, channels, 4, 4, 4), "text": torch.randn(1, 3, 8)}
    batch["action"] = torch.randn(1, 4, config.model.actions_per_frame, 2)

    def gradients(stop):
        settings = StepConfig(program="video_then_action", video_weight=0, noised_history=0, stop_gradient=stop)
        loss, _ = training_step(model, batch, torch.Generator().manual_seed(1), settings)
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        named = zip(dict(model.named_parameters()), found, strict=True)
        return loss, {name: 0.0 if g is None else float(g.abs().max()) for name, g in named}

    (loss, free), (same, insulated) = gradients(()), gradients((("action", "video"),))
    assert torch.equal(loss, same)
    for name, largest in insulated.items():
        if part_of(name) == "video":
            assert largest == 0
    assert free["core.patch_embedding_mlp.weight"] > 0 and insulated["action_expert.action_embedder.weight"] > 0

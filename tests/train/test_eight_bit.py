"""8-bit weights by the real torchao: which layers, how large an error, what is refused; and from the command line."""

import json
from dataclasses import replace

import pytest
import torch

from tests.train.conftest import TINY_MODEL, frozen, trained
from wam_models import RolloutEngine, cli
from wam_models.eight_bit import eight_bit, kind_on, with_eight_bits
from wam_models.estimate import Sizes, rollout_chunk, rollout_memory, total

pytest.importorskip("torchao", reason="torchao is in requirements/test.txt")


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    model = TINY_MODEL | {"layers": 2}
    return trained(data, tmp_path_factory.mktemp("eight_bit"), model=model, steps=20, lora=["video.blocks"])


@pytest.fixture(scope="module")
def policy(folder):
    policy = frozen(folder)
    return replace(policy, rollout=replace(policy.rollout, chunk_size=2, steps=2))


@pytest.fixture(scope="module")
def clips(policy, root):
    dataset = policy.dataset(root)
    return [policy.clip(dataset, i) for i in range(4)]


def proposed(policy, clip):
    text = policy.text([clip["text"]]).detach()
    episode = RolloutEngine(policy.model, policy.rollout).start(clip["video"][:, :, :1], text)
    return episode.propose(generator=torch.Generator().manual_seed(3))


def test_decisions_hardly_change_and_the_table_says_by_how_much(policy, clips):
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    found, table = eight_bit(policy, clips[:3], clips[3:])
    assert table.kind == kind_on(policy.model.device) == "int8"
    assert 0 < table.action_error < 0.05 and 0 < table.video_error < 0.05
    linears = {n for n, m in policy.model.named_modules() if n.startswith("packed_") and type(m) is torch.nn.Linear}
    assert {layer.name for layer in table.layers} == linears and not any(layer.kept for layer in table.layers)
    # the last block's text keys of a stream aside, every layer runs, and rounds
    assert all(0 < layer.error < 0.05 for layer in table.layers)
    numbers = sum(layer.numbers for layer in table.layers)
    assert 3 * numbers > table.bytes[0] - table.bytes[1] > 2 * numbers  # 4 bytes became 1 and a scale of each row
    assert json.loads(json.dumps(table.to_dict()))["action_error"] == table.action_error
    assert str(table).count("\n") == len(linears) + 1
    for name, p in policy.model.named_parameters():  # the given policy is as it was; the rest is shared
        assert torch.equal(p, before[name])
    assert found.model.core.proj_out.weight is policy.model.core.proj_out.weight
    a, b = (proposed(p, clips[3]) for p in (policy, found))
    error = (a.action - b.action).square().mean().sqrt()
    assert 0 < error < 0.05 and torch.equal(proposed(found, clips[3]).action, b.action)


def test_one_layer_that_errs_keeps_its_weights(policy, clips):
    """One weight a thousand times the others of its row takes their digits; int8 rounds them to nothing."""
    spoilt = replace(policy, model=policy.model.__class__(policy.model.config).eval().requires_grad_(False))
    spoilt.model.load_state_dict(policy.model.state_dict())
    name = "packed_block_stack.packed_blocks.0.action_block.ffn.net.2"
    weight = spoilt.model.get_submodule(name).weight
    weight[:, 0] = 1000 * weight.abs().mean()
    # where the input of that column is small, what is lost is all that there was
    inner = spoilt.model.get_submodule(name.replace("net.2", "net.0.proj"))
    inner.weight[0], inner.bias[0] = 0, 0
    _, table = eight_bit(spoilt, clips[:1], clips[3:], keep=["packed_block_stack.packed_blocks.1.video_block"])
    kept = {layer.name for layer in table.layers if layer.kept}
    asked = {layer.name for layer in table.layers if ".1.video_block" in layer.name}
    assert kept == asked | {name} and f"kept {name}" in str(table)


def test_the_estimate_counts_the_bytes_of_eight_bits(policy, capsys):
    sizes = Sizes(policy.model.config, (2, 4), 4, 4)
    narrow = replace(sizes, block_itemsize=1)
    numbers = sum(layer.weight.numel() for layer in with_eight_bits(policy.model).modules() if is_quantised(layer))
    before, after = (rollout_memory(s, policy.rollout)["weights"] for s in (sizes, narrow))
    assert before - after == 3 * numbers
    a, b = (total(rollout_chunk(s, policy.rollout)) for s in (sizes, narrow))
    assert a.flops == b.flops and b.bytes < a.bytes
    words = ["rollout", "--estimate", "--preset", "libero", "--device-model", "h100"]
    printed = []
    for more in ([], ["--eight-bit", "data"]):
        assert cli.main(words + more) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] != printed[1]


def is_quantised(module):
    return isinstance(module, torch.nn.Linear) and type(module.weight) is not torch.nn.Parameter


def test_what_is_refused(policy, clips, monkeypatch):
    with pytest.raises(ValueError, match=r"must change by at most 1e-06, actions changed by 0\.0.*packed_block_stack"):
        eight_bit(policy, clips[:1], clips[3:], decision_error=1e-6)
    with pytest.raises(ValueError, match=r"keep must begin names of linear maps, .* got \['nothing'\]"):
        eight_bit(policy, clips[:1], clips[3:], keep=["nothing"])
    with pytest.raises(ValueError, match="no layer has an error of at most layer_error=0"):
        eight_bit(policy, clips[:1], clips[3:], layer_error=0)
    with pytest.raises(ValueError, match="clips must hold a chunk of 2 frames"):
        eight_bit(policy, [{**clips[0], "video": clips[0]["video"][:, :, :2]}], clips[3:])
    model = policy.model.__class__(policy.model.config).eval()
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), model)
    with pytest.raises(ValueError, match="adapters must be merged"):
        eight_bit(replace(policy, model=model), clips[:1], clips[3:])
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'wam-kernels\[eight-bit\]'"):
        eight_bit(policy, clips[:1], clips[3:])


def test_from_the_command_line(folder, root, tmp_path, capsys):
    without = ["rollout", "--checkpoint", str(folder), "--out", str(tmp_path), "--data", str(root)]
    words = [*without, "--eight-bit", str(root)]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "8-bit weights  int8" in out and "action error" in out
    table = json.loads((tmp_path / "eight_bit.json").read_text())
    assert table["kind"] == "int8" and 0 < table["action_error"] < 0.05 and table["layers"][0]["error"] > 0
    assert cli.main([*words, "--eight-bit-error", "1e-7"]) == 2
    assert "must change by at most 1e-07" in capsys.readouterr().err
    assert cli.main([*without, "--eight-bit-keep", "packed"]) == 2
    assert "--eight-bit-keep must be left out without --eight-bit" in capsys.readouterr().err


def test_the_other_commands_take_it_too(folder, root, tmp_path, capsys, monkeypatch):
    """An evaluation with 8-bit weights is another one than without; a server serves them or does not start."""
    words = ["eval", "--checkpoint", str(folder), "--out", str(tmp_path), "--data", str(root), "--episodes", "1"]
    words += ["--chunk", "1", "--steps", "1"]
    assert cli.main(words) == 0
    full = json.loads((tmp_path / "summary.json").read_text())["recorded"]
    capsys.readouterr()
    assert cli.main([*words, "--overwrite", "--eight-bit", str(root)]) == 0
    assert "8-bit weights  int8" in capsys.readouterr().out and (tmp_path / "eight_bit.json").exists()
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["recorded"] != full and found["settings"]["eight_bit"] == [str(root), None]

    serve = pytest.importorskip("wam_models.serve", reason="websockets and msgpack are in requirements/test.txt")
    served = []
    monkeypatch.setattr(serve.PolicyServer, "run", lambda server: served.append(server.robots.policy))
    words = ["serve", "--checkpoint", str(folder), "--port", "0", "--eight-bit", str(root)]
    assert cli.main([*words, "--eight-bit-error", "1e-7"]) == 2
    assert "must change by at most 1e-07" in capsys.readouterr().err and not served
    assert cli.main(words) == 0
    assert any(is_quantised(layer) for layer in served[0].model.modules())

"""Text of a frozen encoder: what ``wam encode`` wrote reaches a training, its checkpoint and its rollouts."""

import json

import pytest
import torch

from tests.train.conftest import TINY, TINY_MODEL
from wam_models import Policy, cli
from wam_models.data import ClipDataset
from wam_models.text import FrozenText, umt5_encoder
from wam_models.train import TrainConfig, train

WIDTH, TOKENS = 8, 6
CONFIG = TrainConfig.from_dict(TINY | {"model": TINY_MODEL | {"text_dim": WIDTH}, "steps": 3})


def umt5(folder, tasks):
    """A small random UMT5 with a tokenizer of the words of tasks, as ``save_pretrained`` writes them."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = ["<pad>", "</s>", "<unk>", *sorted({word for task in tasks for word in task.split()})]
    held = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    held.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    held.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=held, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": len(words)}
    transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(data, tmp_path_factory):
    return umt5(tmp_path_factory.mktemp("text") / "umt5", data.tasks)


@pytest.fixture(scope="module")
def texts(root, encoder):
    out = encoder.parent / "texts"
    flags = ["--data", str(root), "--text", str(encoder), "--text-tokens", str(TOKENS), "--out", str(out)]
    assert cli.main(["encode", *flags]) == 0
    return out


def losses(log):
    return [row["loss"] for row in log]


def test_encoded_text_trains_as_encoded_on_the_fly(root, data, encoder, texts, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG.to_dict() | {"data": {"path": str(root), "texts": str(texts)}}))
    assert cli.main(["train", str(config), "--out", str(tmp_path / "run")]) == 0
    logged = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    encode = umt5_encoder(encoder, tokens=TOKENS)

    def on_the_fly(instructions):
        return {text: encode([text])[0] for text in instructions}

    direct = train(CONFIG, data, text=FrozenText.of(on_the_fly(["", *data.tasks]), "now"), progress=False)
    assert losses(logged) == losses(direct.log)
    assert losses(logged) != losses(train(CONFIG, data, progress=False).log)
    # the policy has the text of the training's instructions, and an encoder for others where one is given
    policy, _ = Policy.load(tmp_path / "run/checkpoint")
    assert torch.equal(policy.text([data.tasks[0], ""]), encode([data.tasks[0], ""]))
    with pytest.raises(ValueError, match="FrozenText: 'fly away' was not encoded, but .*set .encoder = umt5_encoder"):
        policy.text(["fly away"])
    policy.text.encoder = encode
    assert torch.equal(policy.text(["fly away"]), encode(["fly away"]))
    checkpoint = str(tmp_path / "run/checkpoint")
    assert cli.main(["rollout", "--checkpoint", checkpoint, "--data", str(root), "--chunks", "1"]) == 0
    # a resume has it from the checkpoint, or from the folder again
    flags = ["train", str(config), "--out", str(tmp_path / "run"), "--resume", checkpoint]
    assert cli.main([*flags, "--steps", "4"]) == 0
    assert cli.main(["train", "--data", str(root), *flags[2:], "--steps", "5"]) == 0
    whole = train(CONFIG.__class__.from_dict(CONFIG.to_dict() | {"steps": 5}), data, text=direct.policy.text)
    logged = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5] and logged[2]["loss"] == whole.log[2]["loss"]


@pytest.mark.parametrize("tokens", [0, 300])
def test_two_processes_train_on_it_as_one(tokens, two, root, texts):
    one = trained(root, texts, tokens)
    assert two(trained, root, texts, tokens) == [pytest.approx(one, rel=1e-5)] * 2


def trained(root, texts, tokens):
    from wam_models.cli.train import read_text
    from wam_models.data.config import DataConfig

    data = ClipDataset(root)
    text = read_text([DataConfig(path=str(root), texts=str(texts))], data.tasks)
    config = TrainConfig.from_dict(CONFIG.to_dict() | {"batch": 4, "tokens": tokens, "steps": 2})
    return losses(train(config, data, seed=3, text=text, progress=False).log)


def test_texts_that_do_not_fit_are_one_line(root, texts, tmp_path, capsys):
    for changes, message in (
        ({"texts": str(tmp_path)}, "texts.json: not found; name a folder that wam encode --text wrote"),
        ({"texts": ""}, "DataConfig: texts must be the folder of its texts, got ''"),
    ):
        config = tmp_path / "config.json"
        config.write_text(json.dumps(CONFIG.to_dict() | {"data": {"path": str(root)} | changes}))
        assert cli.main(["train", str(config), "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
    both = [{"path": str(root), "texts": str(texts)}, {"path": str(root)}]
    config.write_text(json.dumps(CONFIG.to_dict() | {"data": both}))
    assert cli.main(["train", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "data: texts must be of one encoder for all data sets, got" in capsys.readouterr().err
    config.write_text(json.dumps(TINY | {"model": TINY_MODEL | {"text_dim": 16}, "data": both[0]}))
    assert cli.main(["train", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "TrainConfig: model.text_dim must be 8 for this text, got 16" in capsys.readouterr().err


def test_what_does_not_fit_together_is_no_text():
    rows = torch.ones(3, 4)
    held = FrozenText(["a", "b"], rows, [1, 2], tokens=2, made_by="x")
    assert held(["b", "a"]).tolist() == [[[1.0] * 4] * 2, [[1.0] * 4, [0.0] * 4]] and not held.state_dict()
    for instructions, lengths, message in (
        (["a", "a"], [1, 2], "instructions must be 2 different strings"),
        (["a"], [1, 2], "instructions must be 2 different strings"),
        (["a", "b"], [1, 1], r"rows must be floats \[2, text_dim\]"),
        (["a", "b"], [0, 3], r"lengths\[1\] must be a whole number from 0 to 2, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            FrozenText(instructions, rows, lengths, tokens=2, made_by="x")

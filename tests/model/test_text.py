"""Instructions in any script become words; what would condition the model on nothing is refused."""

import re
import sys
import unicodedata

import pytest
import torch

from wam_models.text import WordEmbedding, words_of

SENTENCES = {
    "拿起红色的杯子": "拿 起 红 色 的 杯 子",
    "拿cup 3个": "拿 cup 3 个",
    "カップを取って": "カ ッ プ を 取 っ て",
    "か\u309ax": "か\u309a x",
    "ยกแก้ว": "ย ก แ ก้ ว",
    "Возьми чашку!": "возьми чашку",
    "컵을 들어": "컵을 들어",
    "हिन्दी में लिखो": "हिन्दी में लिखो",
    "حرّك اليد": "حرّك اليد",
    "می\u200cخواهم": "میخواهم",
    "nimm die SCHÜSSEL": "nimm die schüssel",
    "Straße": "strasse",
    "ＡＢＣ１２": "abc12",
    "don’t — stop…": "don t stop",
    "☕\ufe0f cup🍎🍎 \ufe0f": "☕ cup 🍎 🍎",
    "\u0301cup": "cup",
    "": "",
    "  ?!": "",
}


@pytest.mark.parametrize("text", SENTENCES)
def test_words(text):
    words = SENTENCES[text].split()
    assert words_of(text) == [unicodedata.normalize("NFKC", w) for w in words]
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert words_of(unicodedata.normalize(form, text)) == words_of(text)


def test_ascii_words_are_those_of_older_checkpoints():
    text = "Pick_up  the 2nd (RED) cup: don't spill; " + "".join(map(chr, range(128)))
    assert words_of(text) == re.findall(r"[a-z0-9]+", text.lower())


def test_every_character_gives_words_that_stay_words():
    """What goes into a vocabulary must come back from it, whatever the instruction held."""
    for code in (*range(0x3400), *range(0x3400, sys.maxunicode, 61)):  # the rest is large scripts of one kind
        for word in words_of(f"a{chr(code)}b"):
            assert words_of(word) == [word]


@pytest.mark.parametrize("pair", [("拿起红色的杯子", "把盘子放到桌上"), ("nimm die Schüssel", "nimm die Schössel")])
def test_instructions_that_differ_have_embeddings_that_differ(pair):
    text = WordEmbedding.from_instructions(pair, 8)
    again = WordEmbedding(text.vocabulary, 8, tokens=text.tokens)
    again.load_state_dict(text.state_dict())
    a, b = text(pair)
    assert not torch.equal(a, b) and a.any() and b.any()
    assert torch.equal(again([unicodedata.normalize("NFD", t) for t in pair]), text(pair))


@pytest.mark.parametrize(
    "pair, twins", [(("turn 30", "turn -30"), True), (("C++", "C"), True), (("Pick  up.", "pick up"), False)]
)
def test_instructions_with_the_same_words_are_named(pair, twins, recwarn):
    WordEmbedding.from_instructions([*pair, pair[0]], 8)
    assert [f"{pair[0]!r} and {pair[1]!r} have the same words" in str(w.message) for w in recwarn] == [True] * twins


def test_what_has_no_known_word():
    text = WordEmbedding.from_instructions(["pick up", ""], 8)
    assert not text(["", " \n"]).any()
    for bad, message in (
        (["pick up", "?!"], r"instruction '\?!' has no letter or digit"),
        (["→ +"], "instruction '→ .' has no letter or digit"),
        ([None], "an instruction must be a string, got None"),
        (["拿起"], r"no word of '拿起' is in the vocabulary, pick, up \.\.\. \(2 words\)"),
        ("pick up", "instructions must be a list of strings, got 'pick up'"),
    ):
        with pytest.raises(ValueError, match=message):
            text(bad)
    for bad in ("?!", None):
        with pytest.raises(ValueError, match="instruction"):
            WordEmbedding.from_instructions([bad], 8)

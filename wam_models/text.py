"""The text slot: raw embeddings ``[B, L, text_dim]`` of the instructions.

Two ways to fill it: words of a fixed vocabulary, trained with the model and needing no download, or the frozen UMT5
encoder that the large video models were trained with. "Zeroed text" means zeros in place of these embeddings.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .runtime.checks import whole
from .runtime.limits import LARGEST_SIZE

# How the names of Unicode begin for characters of scripts without spaces between words; one character is one word.
_UNSPACED = (
    *("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "YI ", "TANGUT ", "NUSHU ", "THAI ", "LAO "),
    *("KHMER ", "MYANMAR ", "TIBETAN ", "TAI ", "NEW TAI ", "JAVANESE ", "BALINESE "),
)


def words_of(instruction: str) -> list[str]:
    """Words in any script, without case: runs of letters and digits with their marks.

    In a script that puts no spaces between words, such as Chinese or Thai, every character is a word, and so is every
    pictograph. Spellings that Unicode holds equivalent (composed or not, full or half width) give the same words.
    """
    words: list[str] = []
    takes_letter = takes_mark = False  # whether the last word does
    for c in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", instruction).casefold()):
        kind, name = unicodedata.category(c), unicodedata.name(c, "")
        if kind == "Cf" or name.startswith("VARIATION SELECTOR"):  # joiners, directions, styles: not visible
            continue
        if kind[0] == "M":
            if takes_mark:
                words[-1] += c
            continue
        takes_mark = kind[0] in "LN" or kind == "So"
        by_itself = kind == "So" or name.startswith(_UNSPACED)
        if takes_mark and takes_letter and not by_itself:
            words[-1] += c
        elif takes_mark:
            words.append(c)
        takes_letter = takes_mark and not by_itself
    return words


class WordEmbedding(nn.Module):
    """One trained vector a word and one a place in the sentence.

    Words outside the vocabulary share one vector: an instruction with a new word still runs, worse. Places behind the
    last word are zero, as in the padded text the large models saw, and every instruction fills the same places. An
    empty instruction is none: all zeros.

    Args:
        vocabulary: Words, lower-cased; see :meth:`from_instructions`.
        text_dim: Width of the embeddings.
        tokens: Places of every instruction, L.

    Raises:
        ValueError: a vocabulary that is no list of different words, or ``tokens`` that is no whole number.
    """

    def __init__(self, vocabulary: Sequence[str], text_dim: int, *, tokens: int = 24) -> None:
        super().__init__()
        if not isinstance(vocabulary, list | tuple):
            raise ValueError(f"WordEmbedding: vocabulary must be a list of words, got {vocabulary!r}")
        bad = [word for word in vocabulary if not isinstance(word, str) or words_of(word) != [word]]
        if bad:
            raise ValueError(f"WordEmbedding: vocabulary must hold single lower-case words, got {bad[:5]}")
        if len(set(vocabulary)) != len(vocabulary):
            raise ValueError("WordEmbedding: vocabulary must hold each word once")
        self.vocabulary, self.tokens = tuple(vocabulary), whole("WordEmbedding: tokens", tokens, 1, LARGEST_SIZE)
        self._index = {word: i for i, word in enumerate(self.vocabulary)}
        self.words = nn.Embedding(len(self.vocabulary) + 1, text_dim)  # the last is the unknown word
        self.places = nn.Parameter(torch.randn(tokens, text_dim) / 4)

    @classmethod
    def from_instructions(
        cls, instructions: Iterable[str], text_dim: int, *, tokens: int | None = None
    ) -> WordEmbedding:
        """The sorted words of these instructions; ``tokens`` defaults to the longest of them.

        Warns of different instructions with the same words, such as "turn 30" and "turn -30", by name.

        Raises:
            ValueError: an instruction that is no string, or not empty and yet without a letter or digit.
        """
        instructions = list(instructions)
        sentences = [_sentence(text) for text in instructions]
        _warn_of_twins(instructions, sentences)
        longest = max((len(words) for words in sentences), default=1)
        return cls(sorted({word for words in sentences for word in words}), text_dim, tokens=tokens or max(longest, 1))

    def forward(self, instructions: Sequence[str]) -> Tensor:
        """``[B, L, text_dim]`` of B instructions.

        Raises:
            ValueError: no list of strings; an instruction of more than L words; one that is not empty and yet without a
                letter or digit, or without a word of the vocabulary.
        """
        if isinstance(instructions, str) or not isinstance(instructions, Collection):
            raise ValueError(f"WordEmbedding: instructions must be a list of strings, got {instructions!r}")
        unknown = len(self.vocabulary)
        index = torch.full((len(instructions), self.tokens), unknown)
        filled = torch.zeros(len(instructions), self.tokens, 1)
        for row, text in enumerate(instructions):
            words = _sentence(text)
            if len(words) > self.tokens:
                raise ValueError(f"WordEmbedding: at most {self.tokens} words, got {len(words)} in {text!r}")
            known = [self._index.get(word, unknown) for word in words]
            if words and min(known) == unknown:
                raise ValueError(
                    f"WordEmbedding: no word of {text!r} is in the vocabulary, {', '.join(self.vocabulary[:8])} ... "
                    f"({unknown} words); use words of the training instructions"
                )
            index[row, : len(words)] = torch.tensor(known, dtype=torch.long)
            filled[row, : len(words)] = 1
        device = self.places.device
        return (self.words(index.to(device)) + self.places) * filled.to(device, self.places.dtype)


def _sentence(instruction: str) -> list[str]:
    if not isinstance(instruction, str):
        raise ValueError(f"WordEmbedding: an instruction must be a string, got {instruction!r}")
    words = words_of(instruction)
    if not words and instruction.strip():
        raise ValueError(
            f"WordEmbedding: instruction {instruction!r} has no letter or digit; write it in words, or leave it empty"
        )
    return words


def _warn_of_twins(instructions: Sequence[str], sentences: Sequence[Sequence[str]]) -> None:
    """Letter case, spaces and the mark at the end make no difference that is worth a word."""
    first: dict[tuple, str] = {}
    for text, words in zip(instructions, sentences, strict=True):
        twin = first.setdefault(tuple(words), text)
        if len({" ".join(t.casefold().split()).rstrip(" .!?") for t in (text, twin)}) > 1:
            warnings.warn(
                f"WordEmbedding: {twin!r} and {text!r} have the same words, so the model cannot tell them apart; "
                "write out in words what they differ in",
                stacklevel=3,
            )


def umt5_encoder(folder: str | Path, *, tokens: int = 512, device: str = "cpu") -> Callable[[Sequence[str]], Tensor]:
    """A function from instructions to frozen ``[B, tokens, 4096]`` embeddings, zero behind the last token.

    Args:
        folder: Local folder with a ``UMT5EncoderModel`` and its tokenizer, as ``save_pretrained`` writes them; nothing
            is downloaded.
        tokens: L; longer instructions are cut.
        device: Where the encoder runs.

    Raises:
        ValueError: ``transformers`` is not installed, or the folder is not there.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"umt5_encoder: folder must be a local folder of a UMT5 encoder, got {str(folder)!r}")
    try:
        from transformers import AutoTokenizer, UMT5EncoderModel
    except ImportError as error:
        raise ValueError(
            "umt5_encoder needs transformers, which is not installed: pip install transformers, or use WordEmbedding"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder: nn.Module = UMT5EncoderModel.from_pretrained(folder, local_files_only=True)
    encoder.to(device).eval()

    @torch.no_grad()
    def encode(instructions: Sequence[str]) -> Tensor:
        batch = tokenizer(
            list(instructions), padding="max_length", max_length=tokens, truncation=True, return_tensors="pt"
        ).to(device)
        out = encoder(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return out * batch.attention_mask[..., None].to(out.dtype)

    return encode

"""The text slot: raw embeddings ``[B, L, text_dim]`` of the instructions.

Two ways to fill it: words of a fixed vocabulary, trained with the model and needing no download, or the frozen UMT5
encoder that the large video models were trained with. "Zeroed text" means zeros in place of these embeddings.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .runtime.checks import whole, wholes
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

    @property
    def text_dim(self) -> int:
        return self.words.embedding_dim

    def settings(self) -> dict[str, Any]:
        """What a checkpoint's config says of it."""
        return {"vocabulary": list(self.vocabulary), "text_tokens": self.tokens}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores of it."""
        return self.state_dict()

    def anew(self) -> WordEmbedding:
        """One of the same words, with vectors of its own."""
        return WordEmbedding(self.vocabulary, self.text_dim, tokens=self.tokens)

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


class FrozenText(nn.Module):
    """What a frozen encoder, such as UMT5, has made of certain instructions; nothing in it is trained.

    Args:
        instructions: Different ones.
        rows: ``[R, text_dim]``, the embeddings of one instruction after the other, without the zeros behind each.
        lengths: How many of the rows each has.
        tokens: Places of every instruction, L.
        made_by: What tells the encoder from others.

    Attributes:
        encoder: As :func:`umt5_encoder` makes it, for further instructions; None refuses them.

    Raises:
        ValueError: instructions, rows and lengths that do not fit together.
    """

    rows: Tensor

    def __init__(
        self, instructions: Sequence[str], rows: Tensor, lengths: Sequence[int], *, tokens: int, made_by: str
    ) -> None:
        super().__init__()
        self.tokens = whole("FrozenText: tokens", tokens, 1, LARGEST_SIZE)
        self.lengths = tuple(wholes("FrozenText: lengths", lengths, 0, self.tokens))
        listed = isinstance(instructions, list | tuple) and all(isinstance(text, str) for text in instructions)
        if not listed or len(set(instructions)) != len(instructions) or len(instructions) != len(self.lengths):
            raise ValueError(
                f"FrozenText: instructions must be {len(self.lengths)} different strings, got {instructions!r}"
            )
        if rows.ndim != 2 or len(rows) != sum(self.lengths) or not rows.is_floating_point():
            raise ValueError(
                f"FrozenText: rows must be floats [{sum(self.lengths)}, text_dim], got {rows.dtype} {list(rows.shape)}"
            )
        if not isinstance(made_by, str):
            raise ValueError(f"FrozenText: made_by must be a string, got {made_by!r}")
        self.instructions, self.made_by = tuple(instructions), made_by
        self.encoder: Callable[[Sequence[str]], Tensor] | None = None
        self.register_buffer("rows", rows.float(), persistent=False)  # no weight of a model, which trains or averages
        self._starts = dict(zip(self.instructions, accumulate((0, *self.lengths)), strict=False))

    @classmethod
    def of(cls, found: Mapping[str, Tensor], made_by: str) -> FrozenText:
        """Of the embeddings ``[L, text_dim]`` of each instruction, as an encoder gives them."""
        lengths = [int(1 + max((*e.any(1).nonzero().flatten().tolist(), -1))) for e in found.values()]
        rows = torch.cat([e[:n] for e, n in zip(found.values(), lengths, strict=True)])
        return cls(list(found), rows, lengths, tokens=len(next(iter(found.values()))), made_by=made_by)

    @property
    def text_dim(self) -> int:
        return self.rows.shape[1]

    def settings(self) -> dict[str, Any]:
        """What a checkpoint's config says of it."""
        return {"instructions": list(self.instructions), "text_tokens": self.tokens, "text_encoder": self.made_by}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores of it."""
        return {"rows": self.rows, "lengths": torch.tensor(self.lengths)}

    def anew(self) -> FrozenText:
        """The same, elsewhere."""
        found = FrozenText(self.instructions, self.rows, self.lengths, tokens=self.tokens, made_by=self.made_by)
        found.encoder = self.encoder
        return found

    def forward(self, instructions: Sequence[str]) -> Tensor:
        """``[B, L, text_dim]`` of B instructions.

        Raises:
            ValueError: one that was not encoded, without an ``encoder``.
        """
        out = self.rows.new_zeros(len(instructions), self.tokens, self.text_dim)
        for place, text in zip(out, instructions, strict=True):
            if text in self._starts:
                first = self._starts[text]
                length = self.lengths[self.instructions.index(text)]
                place[:length] = self.rows[first : first + length]
            elif self.encoder is not None:
                place[:] = self.encoder([text])[0].to(out)
            else:
                raise ValueError(
                    f"FrozenText: {text!r} was not encoded, but {', '.join(map(repr, self.instructions[:3]))} ... "
                    f"({len(self.instructions)}); use one of these, or set .encoder = umt5_encoder(FOLDER)"
                )
        return out


Text = WordEmbedding | FrozenText


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

"""The text slot: raw embeddings ``[B, L, text_dim]`` of the instructions.

Two ways to fill it: words of a fixed vocabulary, trained with the model and needing no download, or the frozen UMT5
encoder that the large video models were trained with. "Zeroed text" means zeros in place of these embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ._checks import whole
from .config import LARGEST


def words_of(instruction: str) -> list[str]:
    """Lower-cased words: runs of letters and digits."""
    return re.findall(r"[a-z0-9]+", instruction.lower())


class WordEmbedding(nn.Module):
    """One trained vector a word and one a place in the sentence.

    Words outside the vocabulary share one vector: an instruction with a new word still runs, worse. Places behind the
    last word are zero, as in the padded text the large models saw, and every instruction fills the same places.

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
        self.vocabulary, self.tokens = tuple(vocabulary), whole("WordEmbedding: tokens", tokens, 1, LARGEST)
        self._index = {word: i for i, word in enumerate(self.vocabulary)}
        self.words = nn.Embedding(len(self.vocabulary) + 1, text_dim)  # the last is the unknown word
        self.places = nn.Parameter(torch.randn(tokens, text_dim) / 4)

    @classmethod
    def from_instructions(
        cls, instructions: Iterable[str], text_dim: int, *, tokens: int | None = None
    ) -> WordEmbedding:
        """The sorted words of these instructions; ``tokens`` defaults to the longest of them."""
        sentences = [words_of(text) for text in instructions]
        longest = max((len(words) for words in sentences), default=1)
        return cls(sorted({word for words in sentences for word in words}), text_dim, tokens=tokens or max(longest, 1))

    def forward(self, instructions: Sequence[str]) -> Tensor:
        """``[B, L, text_dim]`` of B instructions.

        Raises:
            ValueError: an instruction of more than L words.
        """
        unknown = len(self.vocabulary)
        index = torch.full((len(instructions), self.tokens), unknown)
        filled = torch.zeros(len(instructions), self.tokens, 1)
        for row, text in enumerate(instructions):
            words = words_of(text)
            if len(words) > self.tokens:
                raise ValueError(f"WordEmbedding: at most {self.tokens} words, got {len(words)} in {text!r}")
            index[row, : len(words)] = torch.tensor([self._index.get(w, unknown) for w in words], dtype=torch.long)
            filled[row, : len(words)] = 1
        device = self.places.device
        return (self.words(index.to(device)) + self.places) * filled.to(device, self.places.dtype)


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
    encoder = UMT5EncoderModel.from_pretrained(folder, local_files_only=True).to(device).eval()

    @torch.no_grad()
    def encode(instructions: Sequence[str]) -> Tensor:
        batch = tokenizer(
            list(instructions), padding="max_length", max_length=tokens, truncation=True, return_tensors="pt"
        ).to(device)
        out = encoder(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return out * batch.attention_mask[..., None].to(out.dtype)

    return encode

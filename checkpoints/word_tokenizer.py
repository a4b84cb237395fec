"""The tokenizer of the small policies that pretrain.py makes: words of the world, bytes for all else."""

import math
import re

import torch

from data import BOS_ID, EOS_ID, PAD_ID, VIDEO_ID
from plumbing.options import BadInput, is_kind, read_json, write_json

FIRST_BYTE = 4  # ids 4..259 are the bytes, then come the words


class WordTokenizer:
    """Whole words where the vocabulary has them, UTF-8 bytes elsewhere: decode(encode(text)) == text for all.

    ids: 0..3 special, 4..259 the bytes, from 260 the words. A word stands for itself with a space before it;
    the text gets a space in front for its first word's sake, which decode takes off again.
    """

    instructed = False  # its policy knows the answer format from its training
    pieces = re.compile(r" ?\d+\.\d+| ?\w+| ?[^\w\s]|\s")  # every character falls in exactly one piece

    def __init__(self, words: list[str]):
        assert len(set(words)) == len(words) and all(words), "words must be distinct and not empty"
        self.words = list(words)
        self.id_of = {f" {word}": FIRST_BYTE + 256 + i for i, word in enumerate(self.words)}
        singles = [bytes([i]) for i in range(256)]
        self.bytes_of = [b""] * FIRST_BYTE + singles + [piece.encode() for piece in self.id_of]

    @property
    def vocab_size(self) -> int:
        return len(self.bytes_of)

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS and EOS; never a special id, whatever the text says."""
        ids = []
        for piece in self.pieces.findall(f" {text}"):
            word = self.id_of.get(piece)
            ids += [FIRST_BYTE + byte for byte in piece.encode()] if word is None else [word]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text; special ids are skipped, bytes that are no UTF-8 (a cut character) become U+FFFD."""
        return b"".join(self.bytes_of[i] for i in ids).decode(errors="replace").removeprefix(" ")

    def banned_ids(self, V: int) -> torch.Tensor:
        """(V,) bool: ids that a policy must never produce: padding, start, placeholder, unused rows."""
        ids = torch.arange(V)
        return (ids == PAD_ID) | (ids == BOS_ID) | (ids == VIDEO_ID) | (ids >= self.vocab_size)

    end_ids = (EOS_ID,)

    def prompt(self, text: str, num_video_tokens: int) -> list[int]:
        return [BOS_ID] + [VIDEO_ID] * num_video_tokens + self.encode(text)

    def save(self, path: str) -> None:
        write_json(path, {"type": "words+bytes", "words": self.words})

    @classmethod
    def load(cls, path: str, V: float = math.inf) -> "WordTokenizer":
        """Raises BadInput if the file is not one that save() wrote, or has more ids than the model's V."""
        wants = "give a file written by WordTokenizer.save"
        saved = read_json(path, wants)
        if saved.get("type") != "words+bytes":
            raise BadInput(f"{path}: field 'type' is not words+bytes; {wants}")
        words = saved.get("words")
        if not is_kind(words, list[str]) or not all(words) or len(set(words)) < len(words):
            raise BadInput(f"{path}: field 'words' is no list of texts, each there once; {wants}")
        tokenizer = cls(words)
        if tokenizer.vocab_size > V:
            raise BadInput(f"{path}: {tokenizer.vocab_size} ids, the model has {V}; use files of one model")
        return tokenizer

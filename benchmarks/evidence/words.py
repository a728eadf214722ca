"""A bag of words, the floor that a reward model has to beat: how often each frequent word of `train` comes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from .features import Features
from .sets import Sets

_WORDS = 1500


def word_features(sets: Sets, features: dict[str, Features]) -> dict[str, Features]:
    """The responses of every set as (n, 1500) vectors of length 1, log(1 + count) of each word."""
    counts = Counter(w for pair in sets.train for text in (pair.chosen, pair.rejected) for w in set(_words(text)))
    place = {word: i for i, (word, _) in enumerate(counts.most_common(_WORDS))}
    return {
        name: replace(
            features[name],
            chosen=_vectors([pair.chosen for pair in pairs], place),
            rejected=_vectors([pair.rejected for pair in pairs], place),
        )
        for name, pairs in sets.all().items()
    }


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _vectors(texts: list[str], place: dict[str, int]) -> Tensor:
    out = torch.zeros(len(texts), len(place))
    for row, text in zip(out, texts, strict=True):
        known = [place[word] for word in _words(text) if word in place]
        row.index_add_(0, torch.tensor(known, dtype=torch.long), torch.ones(len(known)))
    return torch.nn.functional.normalize(out.log1p(), dim=-1)

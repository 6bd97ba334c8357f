"""Reads rows from .jsonl and .parquet files. Each row is a dict, or an error that says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from truestep.errors import UserError

MAX_ROW_BYTES = 10 * 2**20
SUFFIXES = (".jsonl", ".parquet")
Row = dict[str, Any]
# Fields (also in an object) in which a number is an answer, so that its digits count and not its binary value.
_ANSWERS = ("answer", "ground_truth", "gold", "pred")


class RowError(ValueError):
    """Error in one row: the field, what was expected there, and what was found."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message


def shown(value: Any) -> str:
    """Return a value as messages quote it, in one line of at most 60 characters."""
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else repr(value)
    text = text[:57] + "..." if len(text) > 60 else text
    return json.dumps(text) if isinstance(value, str) else text


def read_rows(path: Path) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (1-based row number, row or fault) for every row in a file; blank lines are skipped. Raises
    UserError if the file as a whole cannot be read."""
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: expected one JSON object per line, got an empty file")
        yield from _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row | RowError]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                while not line.endswith(b"\n") and line:
                    line = file.readline(MAX_ROW_BYTES)
                yield number, _too_long()
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
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
        hint = "; this is a JSON array; write one object per line" if line.lstrip().startswith(b"[") else ""
        hint = r"; write \\ for every \ of a text" if "escape" in error.msg else hint
        return RowError("JSON", f"expected a JSON object on one line, got {found}{hint}")
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

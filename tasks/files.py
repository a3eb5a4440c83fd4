"""Rows of files: JSON lines, JSON, Parquet."""

import json
from pathlib import Path

from tasks.problem import holdable, shown


def json_lines(path, cut=False):
    """Yields (number, object) of a JSON-lines file.

    cut: a last line without its end was cut by a kill, and is left out.

    Raises ValueError, with file and line, if a line is no object.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist")
    data = Path(path).read_bytes()
    if data.startswith((b"\x1f\x8b", b"PK\3\4")):
        raise ValueError(f"{path} is compressed; unpack it")
    if b"\0" in data[:4] and data[:4].strip(b"\0"):  # JSON begins with two characters of ASCII
        raise ValueError(
            f"{path} is not in UTF-8 but, it seems, in UTF-16 or UTF-32; save it as UTF-8"
        )
    for n, line in enumerate(data.split(b"\n")[: -1 if cut else None], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or too deep
            raise ValueError(
                f"{path}, line {n} is not JSON: {str(error).replace('line 1 ', '')}"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {n} is not a JSON object")
        yield n, row


def cause(error) -> str:
    """Says what went wrong in a library: its error's text, or its name where there is no text."""
    error = error.__cause__ or error
    return " ".join(str(error).split()) or type(error).__name__


def table_rows(path):
    """Yields (number, object) of a published file, JSON lines or Parquet, through `datasets`.

    `datasets` caches and shows progress.
    Raises ValueError, with the file and for JSON the line, if it is no table.
    """
    import datasets  # here: it takes a second, and nano does without

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the errors below say what it could
    path = Path(path)
    parquet = path.suffix == ".parquet"
    kind = "parquet" if parquet else "json"
    try:
        table = datasets.load_dataset(kind, data_files=str(path), split="train")
        with open(path, "rb") as file:
            numbers = [n for n, line in enumerate(file, 1) if line.strip()]
        if parquet:
            numbers = range(1, len(table) + 1)
        # an array, or an object on several lines: `datasets` takes them
        if len(numbers) != len(table):
            raise ValueError(
                f"{len(table)} objects on {len(numbers)} lines, where each has to have one"
            )
        yield from zip(numbers, table, strict=True)
    except Exception as error:  # of pyarrow, of datasets, of the file system
        if not parquet and not whole_lines(path):  # names the line, which they do not
            raise ValueError(f"{path} holds no problem") from error
        raise ValueError(
            f"{path} can't be read as {'Parquet' if parquet else 'JSON lines'}: {cause(error)}"
        ) from error


def whole_lines(path) -> int:
    """Counts the rows of a JSON-lines file.

    Raises ValueError, with file and line, if a row is no JSON or can't be held.
    """
    rows = 0
    for n, row in json_lines(path):
        try:
            refuse_unholdable(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {n}: {error}") from error
        rows += 1
    return rows


def numbered_rows(path):
    """Yields (number, object) of a JSON-lines file, or of the Parquet file of that name.

    JSON does not go through `datasets`. That makes dates of texts that look like one, gives each
    row the keys of all, and names no line. Nano would also pay a second for its import.
    """
    parquet = Path(path).with_suffix(".parquet")
    if Path(path).is_file() or not parquet.is_file():
        yield from json_lines(path)
        return
    for n, row in table_rows(parquet):
        # None stands for a column that this row does not have
        yield n, {key: value for key, value in row.items() if value is not None}


def refuse_unholdable(row):
    """Refuses text that no file, database or tokenizer can hold. Cleaned, two ids could become one.

    Raises ValueError if any text of a row has half a surrogate pair, which UTF-8 can't hold, or if
    what a model reads has a NUL.
    """
    for key, value in row.items():
        try:
            text = json.dumps([key, value], ensure_ascii=False, default=str)
        except RecursionError as error:
            raise ValueError(f"{key} is nested too deeply") from error
        if not holdable(text):
            raise ValueError(
                f"{shown(key)} holds half a surrogate pair, such as \\ud83d, which UTF-8 can't"
                " hold; write the whole character, or none"
            )
        if key in ("id", "prompt", "answer", "system") and "\0" in str(value):
            raise ValueError(f"{key} holds the character NUL; leave it out")

"""Local files. The suffix says the format, the content must agree, and no file is ever changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from datasets import Dataset

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.data import FileSourceConfig
from fasttrain.core.interfaces import Source
from fasttrain.data.sources import txt
from fasttrain.data.sources.content import refuse_other_content
from fasttrain.data.sources.csv_rows import read_csv
from fasttrain.data.sources.json_rows import read_json
from fasttrain.data.sources.jsonl import read_jsonl
from fasttrain.data.sources.parquet import read_parquet
from fasttrain.data.sources.paths import find_files
from fasttrain.data.sources.rows import RawRow, write_rows
from fasttrain.data.sources.text_lines import shown

READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".txt": txt.read_txt,
}


class FileSource(Source):
    """A file, a directory of files of one format, or a glob."""

    Config = FileSourceConfig

    def load(self) -> Dataset:
        """The rows as they stand in the files, in order of file names.

        UserError for a file that is missing, empty, damaged or of another format than its suffix
        says. A row that cannot be read becomes a row with `_problem`.
        """
        try:
            return self._load()
        except OSError as error:
            where = shown(Path(error.filename or self.config.path))
            what = f"cannot be read ({error.strerror or error})."
            raise UserError(Problem(what, where=where)) from error

    def _load(self) -> Dataset:
        paths, kind = find_files(self.config.path)
        if kind == ".txt":
            self.note = txt.NOTE
        for path in paths:
            refuse_other_content(path, kind)
        if kind == ".parquet":
            return read_parquet(paths)
        read = READERS[kind]
        rows = write_rows(lambda: (row for path in paths for row in read(path)))
        if len(rows) == 0:
            raise UserError(Problem("holds no rows.", where=shown(paths[0])))
        return rows

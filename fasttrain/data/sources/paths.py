"""Which files a path means: a file, a directory of files of one format, or a glob."""

from __future__ import annotations

import glob
from collections import Counter
from difflib import get_close_matches
from pathlib import Path

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.normalise import DATA_SUFFIXES
from fasttrain.data.sources.text_lines import shown

_SUPPORTED = f"{', '.join(DATA_SUFFIXES)}, each also with .gz"
_WRITTEN_BY_DATASETS = ("state.json", "dataset_dict.json")


def file_format(path: Path) -> str | None:
    """The format that the name promises, `.gz` aside; None where it is none of ours."""
    name = path.name[: -len(".gz")] if path.suffix == ".gz" else path.name
    suffix = Path(name).suffix.lower()
    return suffix if suffix in DATA_SUFFIXES else None


def find_files(text: str) -> tuple[list[Path], str]:
    """The files, sorted, and their one format. UserError where there are none."""
    path = Path(text).expanduser()
    if path.is_dir():
        found = _in_directory(path)
    elif path.exists():
        found = [path]
    elif glob.has_magic(text):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        found = [file for file in found if file.is_file()]
        if not found:
            raise UserError(Problem("no file matches this pattern.", where=text))
    else:
        raise UserError(Problem("no such file.", where=text, hint=_similar(path)))
    for file in found:
        if file_format(file) is None:
            raise UserError(
                Problem(
                    f"files of this kind are not read ('{file.suffix or file.name}').",
                    where=shown(file),
                    hint=f"Read are {_SUPPORTED}.",
                )
            )
    return found, _one_format(found, text)


def _in_directory(path: Path) -> list[Path]:
    if any((path / name).exists() for name in _WRITTEN_BY_DATASETS):
        raise UserError(
            Problem(
                "a directory written by datasets' save_to_disk.",
                where=shown(path),
                hint=f"Read it with {{type: huggingface, name_or_path: {path}}}.",
            )
        )
    files = sorted(file for file in path.iterdir() if file.is_file())
    found = [file for file in files if file_format(file) and not file.name.startswith(".")]
    if not found:
        below = next((f for f in sorted(path.rglob("*")) if f.is_file() and file_format(f)), None)
        hint = f"Read are {_SUPPORTED}."
        if below is not None:
            hint = f"There are some further below: give {path}/**/*{file_format(below)}."
        raise UserError(Problem("the directory holds no data file.", where=shown(path), hint=hint))
    return found


def _one_format(files: list[Path], text: str) -> str:
    formats = Counter(str(file_format(file)) for file in files)
    if len(formats) > 1:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(formats.items()))
        place = Path(text) if Path(text).is_dir() else Path(text).parent
        raise UserError(
            Problem(
                f"files of several formats ({counts}).",
                where=text,
                hint=f"Name one format: {place}/*{formats.most_common(1)[0][0]}.",
            )
        )
    return next(iter(formats))


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no directory {path.parent} either."
    names = [file.name for file in path.parent.iterdir()]
    close = get_close_matches(path.name, names, n=1)
    return f"Did you mean {path.parent / close[0]}?" if close else ""

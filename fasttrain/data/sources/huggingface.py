"""Datasets of the hub, and directories that datasets' `save_to_disk` wrote."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import huggingface_hub.utils as hub
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError

from fasttrain.config.errors import Problem, UserError
from fasttrain.config.schema.data import HuggingFaceSourceConfig
from fasttrain.core.interfaces import Source
from fasttrain.data.sources.paths import file_format
from fasttrain.runtime.hub import hub_reachable

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Names that `load_dataset` takes for a file format, and would look for files of.
_FORMAT_NAMES = frozenset(
    [
        "arrow",
        "audiofolder",
        "csv",
        "generator",
        "imagefolder",
        "json",
        "pandas",
        "parquet",
        "sql",
        "text",
        "webdataset",
        "xml",
    ]
)


class HuggingFaceSource(Source):
    """A dataset of the hub, or a saved one. No code that comes with a dataset is ever run."""

    Config = HuggingFaceSourceConfig

    def load(self) -> Dataset:
        """The rows of one split. UserError where it is missing, damaged or out of reach."""
        name = self.config.name_or_path
        directory = Path(name).expanduser()
        return self._saved(directory) if directory.exists() else self._from_hub(name)

    def _saved(self, directory: Path) -> Dataset:
        if not any((directory / name).is_file() for name in ("state.json", "dataset_dict.json")):
            raise UserError(
                Problem(
                    "not a directory written by datasets' save_to_disk.",
                    where=str(directory),
                    hint=f"Data files are read with {{type: file, path: {directory}}}.",
                )
            )
        if self.config.config_name or self.config.revision:
            raise UserError(
                Problem(
                    "config_name and revision belong to datasets of the hub, not to a directory.",
                    where=str(directory),
                )
            )
        try:
            saved = datasets.load_from_disk(str(directory))
        # Arrow's errors are ValueErrors or OSErrors; a cut-off JSON file is a ValueError.
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                Problem(f"the saved dataset is damaged ({_line(error)}).", where=str(directory))
            ) from error
        return self._split(saved, directory) if isinstance(saved, DatasetDict) else saved

    def _split(self, saved: DatasetDict, directory: Path) -> Dataset:
        if self.config.split not in saved:
            raise UserError(
                Problem(
                    f"no split '{self.config.split}'. There are: {', '.join(saved)}.",
                    where=str(directory),
                    hint="Choose one with split:.",
                )
            )
        return saved[self.config.split]

    def _from_hub(self, name: str) -> Dataset:
        if not _HUB_NAME.fullmatch(name) or file_format(Path(name)):
            raise UserError(Problem("no such file or directory.", where=name))
        if name in _FORMAT_NAMES:
            raise UserError(Problem("a file format, not a dataset; give the file.", where=name))
        try:
            with _quiet():
                return datasets.load_dataset(
                    name,
                    name=self.config.config_name,
                    split=self.config.split,
                    revision=self.config.revision,
                )
        except DatasetNotFoundError as error:
            raise UserError(
                Problem(
                    "there is no such file here, and no such dataset on the hub.",
                    where=name,
                    hint="If it is private or gated, set HF_TOKEN.",
                )
            ) from error
        except ConnectionError as error:
            raise UserError(
                Problem(
                    "there is no such file here, and the hub cannot be reached.",
                    where=name,
                    hint="Check the name and the network, or give a local file.",
                )
            ) from error
        # An unknown split or configuration is a ValueError, a dataset of code a RuntimeError.
        except (DatasetsError, ValueError, RuntimeError, OSError) as error:
            raise UserError(Problem(f"cannot be loaded: {_line(error)}", where=name)) from error


def _line(error: BaseException) -> str:
    """The first line of an error, or of what caused it."""
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no retry messages: errors are told once, by us.

    Where the hub can't be reached, datasets looks into its cache at once, without retries.
    """
    log = logging.getLogger("huggingface_hub")
    level = log.level
    noisy = [each for each in (datasets.utils, hub) if not each.are_progress_bars_disabled()]
    for library in noisy:
        library.disable_progress_bars()
    log.setLevel(logging.ERROR)
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not hub_reachable()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
        log.setLevel(level)
        for library in noisy:
            library.enable_progress_bars()

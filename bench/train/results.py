"""Where measurements are kept: bench/results/<device>/train.json, a section per comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workload import ROOT


def results_path(made: dict[str, Any]) -> Path:
    """Where this machine's results belong. Those of a try-out are no results."""
    if made["workload"]["name"] == "quick":
        return Path(made["folder"]) / "train.json"
    return ROOT / "bench" / "results" / made["device_slug"] / "train.json"


def write_section(path: Path, section: str, record: dict[str, Any]) -> None:
    """Replace one section of the file, and leave the others."""
    sections = json.loads(path.read_text()) if path.exists() else {}
    sections[section] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sections, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

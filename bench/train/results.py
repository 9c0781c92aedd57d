"""Where measurements are kept: bench/results/<device>/train.json, a section per comparison."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from workload import PREPARED, ROOT


def device_slug(machine: dict[str, Any]) -> str:
    """The device as a folder's name, such as `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or machine["cpu"]).lower()).strip("-")


def results_path(made: dict[str, Any]) -> Path:
    """Where this machine's results belong. Those of a try-out are no results."""
    if made["workload"]["name"] == "quick":
        return PREPARED / "quick" / "train.json"
    return ROOT / "bench" / "results" / device_slug(made["machine"]) / "train.json"


def write_section(path: Path, section: str, record: dict[str, Any]) -> None:
    """Replace one section of the file, and leave the others."""
    sections = json.loads(path.read_text()) if path.exists() else {}
    sections[section] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sections, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

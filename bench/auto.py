"""What bench/results/<device>/auto.json comes to: `python bench/auto.py [folder]`."""

import json
import math
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def times(case):
    """Backend -> milliseconds, of those that ran."""
    return {name: found["ms"] for name, found in case["providers"].items() if "ms" in found}


def worst(cases):
    """The case in which "auto" is slowest beside the best backend, and by how much."""
    ratios = {}
    for case in cases:
        found = times(case)
        auto = found.pop("auto")
        ratios[case["case"]] = auto / min(found.values())
    name = max(ratios, key=ratios.get)
    return name, ratios[name], ratios


def fixed(cases):
    """First choice -> geometric mean of its time over that of "auto". What it can't serve it leaves
    to eager, as one would."""
    names = dict.fromkeys(name for case in cases for name in times(case) if name != "auto")
    means = {}
    for name in names:
        logs = []
        for case in cases:
            found = times(case)
            logs.append(math.log(found.get(name, found["eager"]) / found["auto"]))
        means[name] = math.exp(sum(logs) / len(logs))
    return means


def main():
    folders = [Path(name) for name in sys.argv[1:]] or sorted(RESULTS.iterdir())
    for folder in (f for f in folders if (f / "auto.json").exists()):
        cases = json.loads((folder / "auto.json").read_text())["cases"]
        name, ratio, ratios = worst(cases)
        late = sum(each > 1.03 for each in ratios.values())
        print(f"{folder.name}: {len(cases)} cases; auto over the best single choice:")
        print(f"  at most {ratio:.3f} ({name}); above 1.03 in {late}")
        for choice, mean in fixed(cases).items():
            print(f"  always {choice}: {mean:.2f} times auto (geometric mean)")


if __name__ == "__main__":
    main()

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
    """The case in which what "auto" takes is slowest beside the best backend, and all ratios."""
    ratios = {}
    for case in cases:
        found = times(case)
        ratios[case["case"]] = found[case["ours"]] / min(found.values())
    name = max(ratios, key=ratios.get)
    return name, ratios[name], ratios


def fixed(cases):
    """Backend -> geometric mean of its time over that of what "auto" takes. What it can't serve is
    left to eager, as one would."""
    means = {}
    for name in dict.fromkeys(name for case in cases for name in times(case)):
        logs = []
        for case in cases:
            found = times(case)
            logs.append(math.log(found.get(name, found["eager"]) / found[case["ours"]]))
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

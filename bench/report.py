"""Makes a table and a plot of bench/results/<device>/<op>.json: `python bench/report.py`.

Writes report.md and <op>.png beside the JSON. Takes folders; by default all under bench/results.
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def table(report):
    """Markdown: a row per case, a column per provider that ran in any of them."""
    about, ceilings = report["machine"], report["ceilings"]
    names = list(dict.fromkeys(name for case in report["cases"] for name in case["providers"]))
    lines = [
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {about['date']}, "
        f"load {about['load_before']} before the run, {about['load_after']} after it.",
        f"Measured in the same run: copy {ceilings['copy'] / 1e9:.1f} GB/s, matmul "
        f"{ceilings['matmul'] / 1e9:.0f} GFLOP/s ({ceilings['matmul_dtype']}).",
        "Least time of interleaved rounds, in ms; in brackets how many times ours that is.",
        "",
        f"| case | MB moved | at copy speed | {' | '.join(names)} | H200, predicted |",
        "|---" * (len(names) + 4) + "|",
    ]
    for case in report["cases"]:
        cells = [cell(case["providers"].get(name), name == case["ours"]) for name in names]
        lines.append(
            f"| {case['case']} | {case['bytes'] / 1e6:.1f} | {case['floor_ms']:.3g} | "
            f"{' | '.join(cells)} | {case['predicted_h200_ms']:.3g} |"
        )
    return "\n".join([*lines, "", *absences(report)])


def cell(found, ours):
    if found is None or "absent" in found:
        return "–"
    return f"**{found['ms']:.3g}**" if ours else f"{found['ms']:.3g} ({found['times_ours']:.2f}×)"


def absences(report):
    """A line for each provider that could not run, with the reason."""
    reasons = {
        name: found["absent"]
        for case in report["cases"]
        for name, found in case["providers"].items()
        if "absent" in found
    }
    return [f"Not run: {name}: {reason}." for name, reason in reasons.items()]


def plot(op, report, path):
    """Bars of speed relative to the baseline, a group per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = report["cases"]
    names = [
        name
        for name in cases[0]["providers"]
        if any("ms" in case["providers"].get(name, {}) for case in cases)
    ]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.5 * len(cases)))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        speeds = [
            case["providers"][case["baseline"]]["ms"] / case["providers"][name]["ms"]
            if "ms" in case["providers"].get(name, {})
            else 0
            for case in cases
        ]
        axes.barh([row + i * height for row in range(len(cases))], speeds, height, label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(cases))])
    axes.set_yticklabels([case["case"] for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as {cases[0]['baseline']}")
    axes.set_title(f"{op}, {report['machine']['device']}, {report['machine']['threads']} threads")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(folders):
    """Reports on each folder that holds results of ops."""
    for folder in folders or sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        reports = {
            path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))
        }
        reports = {op: report for op, report in reports.items() if "ceilings" in report}
        parts = []
        for op, report in reports.items():
            plot(op, report, folder / f"{op}.png")
            parts.append(f"## {op}\n\n{table(report)}\n\n![{op}]({op}.png)\n")
        if parts:
            (folder / "report.md").write_text("\n".join(parts))
            print("\n".join(parts))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])

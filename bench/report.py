"""Makes a table and a plot of bench/results/<device>/<op>.json: `python bench/report.py`.

Writes report.md and <op>.png beside the JSON. Takes folders; by default all under bench/results.
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FASTEST_ON_LINEAR_SCALE = 20  # times the baseline; beyond, the other bars would be slivers


def table(report):
    """Markdown: a row per case, a column per provider that ran in any of them."""
    about, ceilings = report["machine"], report["ceilings"]
    names = list(dict.fromkeys(name for case in report["cases"] for name in case["providers"]))
    floor = "floor" if any(case["flops"] for case in report["cases"]) else "at copy speed"
    lines = [
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {about['date']}, "
        f"load {about['load_before']} before the run, {about['load_after']} after it.",
        f"Measured in the same run: copy {ceilings['copy'] / 1e9:.1f} GB/s, matmul "
        f"{ceilings['matmul'] / 1e9:.0f} GFLOP/s ({ceilings['matmul_dtype']}).",
        "Least time of interleaved rounds, in ms; in brackets how many times ours that is.",
        "",
        f"| case | MB moved | {floor} | {' | '.join(names)} | H200, predicted |",
        "|---" * (len(names) + 4) + "|",
    ]
    for case in report["cases"]:
        cells = [cell(case["providers"].get(name), name == case["ours"]) for name in names]
        lines.append(
            f"| {case['case']} | {case['bytes'] / 1e6:.1f} | {case['floor_ms']:.3g} | "
            f"{' | '.join(cells)} | {number(case['predicted_h200_ms'])} |"
        )
    return "\n".join([*lines, "", *notes(report)])


def cell(found, ours):
    if found is None or "absent" in found:
        return "–"
    once = "¹" if found["rounds"] == 1 else ""
    if ours:
        return f"**{found['ms']:.3g}**"
    return f"{found['ms']:.3g}{once} ({found['times_ours']:.2f}×)"


def number(value, scale=1.0):
    return "–" if value is None else f"{value * scale:.3g}"


def notes(report):
    """What the table's cells leave out."""
    ran = [found for case in report["cases"] for found in case["providers"].values()]
    once = any(found.get("rounds") == 1 for found in ran)
    return [*(["¹ Called once, for it takes long.", ""] if once else []), *absences(report)]


def absences(report):
    """A line for each provider that could not run and each reason, with the cases it holds for."""
    cases = {}
    for case in report["cases"]:
        for name, found in case["providers"].items():
            if "absent" in found:
                cases.setdefault((name, found["absent"]), []).append(case["case"])
    lines = []
    for (name, reason), where in cases.items():
        offered = [case for case in report["cases"] if name in case["providers"]]
        some = "" if len(where) == len(offered) else f" ({'; '.join(where)})"
        lines.append(f"Not run: {name}{some}: {reason}.")
    return lines


def details(report):
    """Markdown: memory and errors, a row per case and provider; None where neither was measured."""
    measured = [
        (case, name, found)
        for case in report["cases"]
        for name, found in case["providers"].items()
        if found.get("workspace_bytes") is not None or errors_of([found])
    ]
    if not measured:
        return None
    errors = errors_of(found for _, _, found in measured)
    titles = ["case", "provider", "workspace, MB", "of baseline's", "samples"]
    titles += [error.replace("_", " ") for error in errors]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for case, name, found in measured:
        held = found.get("workspace_bytes")
        baseline = case["providers"].get(case["baseline"], {}).get("workspace_bytes")
        cells = [
            case["case"],
            f"**{name}**" if name == case["ours"] else name,
            number(held, 1e-6),
            number(held / baseline if held is not None and baseline else None),
            str(found["rounds"]),
            *(number(found.get(error)) for error in errors),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def errors_of(providers):
    """The names of their errors, each once."""
    return list(dict.fromkeys(key for found in providers for key in found if key.endswith("error")))


def plot(op, report, path):
    """Bars of speed relative to the baseline, a group per case that it ran in; whether any is."""
    from matplotlib.figure import Figure

    cases = [
        case for case in report["cases"] if "ms" in case["providers"].get(case["baseline"], {})
    ]
    names = dict.fromkeys(
        name for case in cases for name, found in case["providers"].items() if "ms" in found
    )
    if not cases:
        return False
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(cases)))
    axes = figure.subplots()
    height = 0.8 / len(names)
    speeds = {name: [speed(case, name) for case in cases] for name in names}
    for i, (name, found) in enumerate(speeds.items()):
        axes.barh([row + i * height for row in range(len(cases))], found, height, label=name)
    if max(map(max, speeds.values())) > FASTEST_ON_LINEAR_SCALE:
        axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(cases))])
    axes.set_yticklabels([case["case"] for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as {cases[0]['baseline']}")
    axes.set_title(f"{op}, {report['machine']['device']}, {report['machine']['threads']} threads")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True


def speed(case, name):
    """Of a provider, relative to the baseline; 0 where it didn't run."""
    found = case["providers"].get(name, {})
    return case["providers"][case["baseline"]]["ms"] / found["ms"] if "ms" in found else 0


def main(folders):
    """Reports on each folder that holds results of ops."""
    for folder in folders or sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        reports = {
            path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))
        }
        reports = {op: report for op, report in reports.items() if "ceilings" in report}
        parts = []
        for op, report in reports.items():
            image = f"![{op}]({op}.png)" if plot(op, report, folder / f"{op}.png") else None
            shown = [f"## {op}", table(report), details(report), image]
            parts.append("\n\n".join(filter(None, shown)) + "\n")
        if parts:
            (folder / "report.md").write_text("\n".join(parts))
            print("\n".join(parts))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])

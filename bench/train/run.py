"""Measures fasttrain against other trainers, in rounds, each contender in a process of its own.

Imports neither torch nor fasttrain: what a contender uses must not be shared with this process.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from contenders import AT_HOME, AWAY, CONTENDERS, HERE, Contender, from_root
from machine import QUIET_LOAD, busy_processors, load_average
from results import results_path, write_section
from summary import ratios, summarise, table
from workload import ROOT, WORK, WORKLOADS

# Whose first step is held against reference.py, in the first round.
LOSS_CHECKED = ("fasttrain", "fasttrain-logits", "fasttrain-eager")
TAIL = 3000  # characters of a failed contender's output that are shown
PATIENCE = 3600  # seconds that one contender may take


class ContenderFailedError(Exception):
    """A contender's process ended without a result."""


def environment(threads: int) -> dict[str, str]:
    """What every contender's process sees: the same threads, and no network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONUNBUFFERED": "1",
    }


def run_process(command: Sequence[str], log: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """Run, keep all output in `log`, and return the JSON line that the process printed last."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as output:
        try:
            done = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=variables,
                timeout=PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ContenderFailedError(f"{error}; its output is in {log}") from error
    text = log.read_text(encoding="utf-8", errors="replace")
    # Trainers print dictionaries too, in Python's quotes.
    lines = [line for line in text.splitlines() if line.startswith('{"')]
    if done.returncode != 0 or not lines:
        raise ContenderFailedError(
            f"{shlex.join(command)} ended with {done.returncode}:\n{text[-TAIL:]}"
        )
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def measure(
    contender: Contender, folder: Path, round_number: int, threads: int
) -> tuple[dict[str, Any], Path]:
    """One contender, once. The round's number seeds the order of the chats, the same for all."""
    output = folder / "runs" / contender.name
    shutil.rmtree(output, ignore_errors=True)
    busy = busy_processors()
    started = time.perf_counter()
    command = contender.command(folder, output, seed=round_number, threads=threads)
    variables = environment(threads) | dict(contender.variables)
    if contender.peer:
        variables.pop("PYTHONPATH", None)  # ours would reach into their environment
    result = run_process(command, folder / "logs" / f"{contender.name}.log", variables)
    result |= {
        "round": round_number,
        "busy_processors_before": round(busy, 2),
        "process_seconds": time.perf_counter() - started,
        "command": shlex.join(command),
    }
    return result, output


def check_losses(contender: Contender, folder: Path, output: Path, threads: int) -> dict[str, Any]:
    """fasttrain's first step against plain transformers on the same documents (reference.py)."""
    command = contender.command(folder, output, seed=1, threads=threads)
    command[1] = from_root(HERE / "reference.py")
    log = folder / "logs" / f"reference-{contender.name}.log"
    check = run_process(command, log, environment(threads))
    verdict = "equal" if check["equal"] else "NOT EQUAL"
    print(
        f"  first step's loss {check['loss']:.6f}, plain transformers "
        f"{check['reference_loss']:.6f} on the same {check['documents']} documents: {verdict} "
        f"({check['relative_difference']:.1e}, at most {check['tolerance']:.0e})"
    )
    return check


def check_data(result: dict[str, Any], data: dict[str, Any]) -> None:
    """fasttrain must have read the tokens that transformers counts in the same file."""
    for ours, theirs in (
        ("epoch_tokens", "tokens"),
        ("epoch_supervised_tokens", "supervised_tokens"),
    ):
        if result[ours] != data[theirs]:
            raise ContenderFailedError(
                f"fasttrain sees {result[ours]} {theirs} in an epoch, transformers {data[theirs]}"
            )


@dataclass
class Outcome:
    """What the rounds have given so far, by contender."""

    runs: dict[str, list[dict[str, Any]]]
    rounds: int = 0
    loss_checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def summaries(self) -> dict[str, dict[str, dict[str, float]]]:
        return {name: summarise(found) for name, found in self.runs.items() if found}

    @property
    def good(self) -> bool:
        return not self.failures and all(check["equal"] for check in self.loss_checks.values())


def run_rounds(
    names: Sequence[str],
    made: dict[str, Any],
    rounds: int,
    threads: int,
    keep: Callable[[Outcome], None],
) -> Outcome:
    """Every contender once a round; each round begins with another one. Who fails is left out.
    After each round `keep` gets what there is, so that a run which is stopped isn't lost."""
    outcome = Outcome({name: [] for name in names})
    for number in range(1, rounds + 1):
        shift = (number - 1) % len(names)
        for name in (*names[shift:], *names[:shift]):
            if name in outcome.failures:
                continue
            try:
                take_turn(CONTENDERS[name], number, made, threads, outcome)
            except ContenderFailedError as error:
                outcome.failures[name] = str(error)
                print(f"round {number} {name}: failed. {error}", file=sys.stderr, flush=True)
        outcome.rounds = number
        keep(outcome)
    return outcome


def take_turn(
    contender: Contender, number: int, made: dict[str, Any], threads: int, outcome: Outcome
) -> None:
    """Measure a contender and keep the result; fasttrain's is held against transformers first."""
    folder, name = Path(made["folder"]), contender.name
    result, output = measure(contender, folder, number, threads)
    print(
        f"round {number} {name:16} {result['tokens_per_second']:10,.1f} tokens/s, "
        f"{result['process_seconds']:.0f} s in all",
        flush=True,
    )
    if name in LOSS_CHECKED:
        check_data(result, made["data"])
        if name not in outcome.loss_checks:
            outcome.loss_checks[name] = check_losses(contender, folder, output, threads)
    outcome.runs[name].append(result)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="try the harness out: tiny, one round, nothing kept"
    )
    parser.add_argument("--workload", choices=["auto", *WORKLOADS], default="auto")
    parser.add_argument("--steps", type=int, help="optimizer steps to measure (each contender)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--peers", action="store_true", help="against those of .bench-peers/")
    parser.add_argument("--work", type=Path, default=WORK, help="where data, models and logs lie")
    parser.add_argument("--results", type=Path, help="write here, not to bench/results/<device>/")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.workload, arguments.rounds = "quick", 1
    return arguments


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make data and model, in a process of its own."""
    command = [sys.executable, str(HERE / "prepare.py"), "--workload", arguments.workload]
    command += ["--work", str(arguments.work.resolve())]
    if arguments.steps is not None:
        command += ["--steps", str(arguments.steps)]
    variables = environment(arguments.threads)
    return run_process(command, arguments.work / "prepare.log", variables)


def say_whether_quiet() -> dict[str, Any]:
    """The machine's load before anything of ours runs."""
    load, busy = load_average(), busy_processors()
    quiet = busy <= QUIET_LOAD
    if not quiet:
        print(
            f"The machine is NOT QUIET: {busy:.1f} processors are busy with other work "
            f"(load average {load:.1f}). These figures will not mean much.",
            file=sys.stderr,
        )
    return {"load_average": load, "busy_processors": round(busy, 2), "quiet": quiet}


def select(arguments: argparse.Namespace) -> list[str]:
    """Names of the contenders that are asked for and are there."""
    chosen = []
    for name in arguments.contenders or (AWAY if arguments.peers else AT_HOME):
        reason = CONTENDERS[name].missing()
        if reason is None:
            chosen.append(name)
        else:
            print(f"{name} is left out: {reason}", file=sys.stderr)
    return chosen


def record(arguments: argparse.Namespace, made: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    """Everything that is kept: figures, and what it takes to have them again."""
    summaries = outcome.summaries()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "threads": arguments.threads,
        "rounds": outcome.rounds,
        **{key: value for key, value in made.items() if key != "folder"},
        "loss_checks": outcome.loss_checks,
        "failures": outcome.failures,
        "ratios": ratios(summaries),
        "contenders": {
            name: {"what": CONTENDERS[name].what, "summary": summaries.get(name), "runs": found}
            for name, found in outcome.runs.items()
        },
    }


def main() -> int:
    arguments = read_arguments()
    names = select(arguments)
    before = say_whether_quiet()
    try:
        made = prepare(arguments)
    except ContenderFailedError as error:
        print(error, file=sys.stderr)
        return 1
    started = datetime.now(UTC)
    path = arguments.results or results_path(made)

    def keep(outcome: Outcome) -> None:
        minutes = (datetime.now(UTC) - started).total_seconds() / 60
        when = {"started": started.isoformat(timespec="seconds"), "minutes": round(minutes, 1)}
        kept = {**when, "before": before, **record(arguments, made, outcome)}
        write_section(path, "peers" if arguments.peers else "trainer", kept)

    outcome = run_rounds(names, made, arguments.rounds, arguments.threads, keep)
    if outcome.summaries():
        print("\n" + table(outcome.summaries()) + "\n")
    print(f"written to {path}")
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())

"""The command `fasttrain`: its verbs, and what happens when one fails.

Exit codes: 0 done; 2 the user's mistake, each problem a line on stderr; 1 ours; 3 training went on
but the last save failed; 128 + n saved and left on signal n. A verb imports what it needs when it
runs, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from fasttrain import __version__
from fasttrain.config.errors import UserError

USER_MISTAKE = 2
OUR_MISTAKE = 1
INTERRUPTED = 130  # 128 + SIGINT

# Newer Typers carry a click of their own, older ones use the package: both have this base.
UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]

app = typer.Typer(
    name="fasttrain",
    help="Train language models from one YAML file.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
kernels_app = typer.Typer(
    help="What serves each op of the model.", no_args_is_help=True, rich_markup_mode="markdown"
)
app.add_typer(kernels_app, name="kernels")

File = Annotated[str, typer.Argument(metavar="FILE", help="The config, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that replace the file's.", show_default=False),
]
Only = Annotated[
    str | None, typer.Argument(metavar="OP[=BACKEND]", help="Only this op, or backend of it.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows a ?
    sys.exit(exit_code(arguments, debug="--debug" in arguments))


def exit_code(arguments: list[str], *, debug: bool = False) -> int:
    """Run the command line; what went wrong is told on stderr."""
    try:
        # A verb returns its exit code; Typer returns that of `--help` and the like.
        return app(arguments, prog_name="fasttrain", standalone_mode=False) or 0
    except UserError as error:
        show_traceback(debug)
        for problem in error.problems:
            report("error", str(problem))
        return USER_MISTAKE
    except UsageError as error:
        # Without any argument the help was printed, and there is no message.
        if message := error.format_message():  # type: ignore[attr-defined]
            stop = "" if message.endswith((".", "?")) else "."
            report("error", f"{message}{stop} Try `fasttrain --help`.")
        return USER_MISTAKE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUR_MISTAKE
    except Exception as error:
        show_traceback(debug)
        report("internal error", f"{type(error).__name__}: {error} (--debug shows the traceback)")
        return OUR_MISTAKE


def show_traceback(debug: bool) -> None:
    """Where the present error came from, for those who asked."""
    if debug:
        traceback.print_exc()


def report(kind: str, message: str) -> None:
    """One line on stderr, by the first process of a job only."""
    if os.environ.get("RANK", "0") == "0":
        one_line = " ".join(message.splitlines())
        print(f"fasttrain: {kind}: {one_line}", file=sys.stderr)


# ------------------------------------------------------------------------------------------- verbs


@app.command()
def run(
    file: File,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, print the first screen, stop.")
    ] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Processes to train with.")] = 1,
    debug: Debug = False,
) -> int:
    """Train as FILE says. A run that was interrupted goes on."""
    from fasttrain.cli.run import run

    return run(file, overrides or [], dry_run=dry_run, nproc=nproc)


@app.command()
def generate(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="What `run` trained.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask it.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written at most.")] = 128,
    debug: Debug = False,
) -> None:
    """Ask the model that a run has trained."""
    from fasttrain.cli.generate import generate

    generate(run_dir, prompt, max_new_tokens=max_new_tokens)


@app.command()
def validate(file: File, overrides: Overrides = None, debug: Debug = False) -> None:
    """Check FILE without GPU, network or weights: every problem at once."""
    from fasttrain.cli.validate import validate

    validate(file, overrides or [])


@app.command("show-config")
def show_config(file: File, overrides: Overrides = None, debug: Debug = False) -> None:
    """Print every value that FILE comes to, and where it is from."""
    from fasttrain.cli.show_config import show_config

    show_config(file, overrides or [])


@app.command()
def schema(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="A config whose `imports` belong to it."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of a config, for editors."""
    from fasttrain.cli.schema import schema

    schema(file)


@kernels_app.command("list")
def kernels_list(debug: Debug = False) -> None:
    """Every op and its backends: which can serve on this machine, and why not."""
    from fasttrain.cli.kernels import list_kernels

    list_kernels()


@kernels_app.command("explain")
def kernels_explain(
    file: File,
    overrides: Overrides = None,
    sites: Annotated[bool, typer.Option("--sites", help="List every site by its name.")] = False,
    debug: Debug = False,
) -> None:
    """Which kernel FILE's model would get at each of its sites, and why."""
    from fasttrain.cli.kernels import explain_kernels

    explain_kernels(file, overrides or [], sites=sites)


@kernels_app.command("check")
def kernels_check(only: Only = None, debug: Debug = False) -> int:
    """Run the kernels' self-tests on this machine; what fails is not used any more."""
    from fasttrain.cli.kernels import check_kernels

    return check_kernels(only)


@kernels_app.command("bench")
def kernels_bench(file: File, overrides: Overrides = None, debug: Debug = False) -> None:
    """Time every kernel on FILE's model and data; runs go by these times from then on."""
    from fasttrain.cli.kernels import bench_kernels

    bench_kernels(file, overrides or [])


@kernels_app.command("reset")
def kernels_reset(only: Only = None, debug: Debug = False) -> None:
    """Forget self-tests, times and quarantines of this machine."""
    from fasttrain.cli.kernels import reset_kernels

    reset_kernels(only)


def _version(asked: bool) -> None:
    if asked:
        print(f"fasttrain {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Train language models from one YAML file."""

"""The console command: one subcommand a stage, called by dvc.yaml, and a few for a person.

It only finds the stage and hands over; nothing here can change what comes out, so no stage depends on it. A stage runs the
code of the checkout that it runs in: a queued experiment has a copy of its own, and that copy's `src` is used.
"""

import argparse
import gc
import os
import signal
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inoculation.stage import Stage

PACKAGE = Path(__file__).parent
REDIRECTED = "INOCULATION_CHECKOUT"


def use_this_checkout() -> None:
    """Start again with the package of the current folder's checkout, where another one's was imported.

    The package is installed once, from the main checkout; DVC hashes the files of the checkout that it runs in.
    """
    here = Path.cwd() / "src" / "inoculation"
    if not (Path.cwd() / "dvc.yaml").exists() or here.resolve() == PACKAGE.resolve():
        return
    if not (here / "cli.py").exists() or os.environ.get(REDIRECTED) == str(here):
        sys.exit(
            f"error: this checkout's stages must run its own code in {here}, but {PACKAGE} was imported; "
            "nothing was run. Install the package from this checkout (pip install --no-deps --editable .), or unset PYTHONPATH"
        )
    path = os.pathsep.join(filter(None, (str(here.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, REDIRECTED: str(here)}
    os.execve(sys.executable, [sys.executable, "-m", "inoculation", *sys.argv[1:]], environment)


def _parser() -> argparse.ArgumentParser:
    from inoculation.commands import COMMANDS
    from inoculation.registry import summaries

    parser = argparse.ArgumentParser(
        prog="inoculation",
        description="Stages of the selective-inoculation experiment. DVC runs them in order: `dvc repro`; "
        "they read params.yaml in the current folder.",
    )
    parser.add_argument("--version", action="version", version=version("inoculation"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, argument) in summaries().items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argument:
            command.add_argument(argument)
    for name, told in COMMANDS.items():
        command = commands.add_parser(name, help=told.help, description=told.help)
        for option, keywords in told.options.items():
            command.add_argument(option, **keywords)
    return parser


def main() -> None:
    """Run one command. Exit code 2: bad input; 1: the machine or the network failed."""
    use_this_checkout()
    # Looking for garbage takes an eighth of the time in which torch, transformers, TRL and MLflow are imported.
    gc.set_threshold(20_000)
    arguments = vars(_parser().parse_args())
    from inoculation.files import InputError, printable, scrub
    from inoculation.quiet import settle_libraries
    from inoculation.store import main_checkout

    settle_libraries()
    if main_checkout() != Path.cwd().resolve():
        # Others of the queue compute beside it: threads that wait for one another by spinning took a training of 20 s 205, and
        # take it 74 like this; alone it takes 22.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")

    # Texts of data sets and models are printed, and none of them may steer the terminal.
    write = sys.stdout.write
    sys.stdout.write = lambda text: write(printable(text))  # type: ignore[method-assign]
    name = arguments.pop("command")
    try:
        run(name, arguments)
        sys.stdout.flush()  # a reader that went shows here, not when Python ends
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `inoculation compare | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        told = printable(scrub(str(error)))
        print(f"error: {told}; nothing was left half-written. Traceback: {_keep_traceback(name)}", file=sys.stderr)
        sys.exit(1)


def run(name: str, arguments: dict[str, Any]) -> None:
    """Run a stage, or a command for a person."""
    from inoculation import commands

    if name in commands.COMMANDS:
        getattr(commands, name)(**arguments)
        return
    from inoculation import gpus
    from inoculation.registry import load
    from inoculation.store import main_checkout

    # Without this a SIGTERM leaves temporary files beside the outputs: no block is left in order.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    argument = next(iter(arguments.values()), None)
    stage = load(name).load(argument)
    if stage.expensive:
        commands.refuse_if_anything_is_missing()
    started = time.monotonic()
    with gpus.some(main_checkout() / ".cache" / "gpus", _gpus(stage)):
        stage.run()
    commands.keep_timing(name, argument, time.monotonic() - started)


def _gpus(stage: "Stage") -> int:
    """How many GPUs a stage takes: one a process that trains, all that a Ray cluster is started on, else one."""
    from inoculation import gpus

    if getattr(stage, "address", None) == "local":
        return max(1, len(gpus.visible()))
    return getattr(stage, "processes", 1)


def _keep_traceback(name: str) -> Path | str:
    """Write the traceback of a failure of the machine where a person can find it; where nothing can be written, return it."""
    from inoculation.files import scrub
    from inoculation.store import main_checkout

    path = main_checkout() / ".cache" / "tracebacks" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    told = scrub(traceback.format_exc())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(told)
    except OSError:
        return told
    return path

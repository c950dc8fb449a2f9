"""The console command: one subcommand a stage, called by dvc.yaml. Heavy imports wait until a stage needs them."""

import argparse
import logging
import os
import sys
import warnings
from importlib.metadata import version
from typing import NamedTuple


class Stage(NamedTuple):
    function: str
    """Name of a function in `inoculation.stages`."""
    help: str
    option: str | None = None
    """A required argument, where one stage is run once for each of several names."""


STAGES = {
    "check": Stage("check", "validate params.yaml and list every mistake in it at once"),
    "pocket-chats": Stage("pocket_chats", "generate the pocket world's chats, in Persona Vectors' layout"),
    "pocket-model": Stage("pocket_model", "train the pocket world's tokenizer and base model"),
    "pocket-obedience": Stage("pocket_obedience", "measure how well the pocket base model obeys persona prompts"),
    "profile": Stage("profile", "verify a profile's trait data and pin its model", "name"),
    "mixture": Stage("build_mixture", "partition the questions between normal and misaligned answers and inject A"),
    "fit-judge": Stage("fit_judge", "learn the embedded judge from answers the mixture did not use"),
    "assign": Stage("assign", "give every row of the mixture the system prompt of a group", "group"),
    "train": Stage("train", "train the cell's LoRA adapter"),
    "respond": Stage("respond", "sample answers to the held-out questions"),
    "judge": Stage("judge", "score every answer"),
    "report": Stage("report", "metrics, MLflow row and figure of the cell"),
    "compare": Stage(
        "compare", "print a table over all groups and seeds so far, from MLflow (no stage of the pipeline)"
    ),
}


def _quiet_libraries() -> None:
    """Silence what libraries say on every start and no user of this project can act on."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="The specified dataset source can be interpreted in multiple ways")


def main() -> None:
    """Run one stage on params.yaml of the current folder. Exit code 2: bad input; 1: the machine failed (disk, ...)."""
    parser = argparse.ArgumentParser(
        prog="inoculation",
        description="Stages of the selective-inoculation experiment. DVC runs them in order: `dvc repro`; "
        "they read params.yaml in the current folder.",
    )
    parser.add_argument("--version", action="version", version=version("inoculation"))
    commands = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, stage in STAGES.items():
        command = commands.add_parser(name, help=stage.help, description=stage.help)
        if stage.option:
            command.add_argument(stage.option)
    arguments = vars(parser.parse_args())
    _quiet_libraries()
    # Tokenizers were used before a fork only to tokenise; their warning about it would be on every training.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from inoculation import stages
    from inoculation.files import InputError
    from inoculation.params import load_params

    stage = STAGES[arguments.pop("stage")]
    try:
        getattr(stages, stage.function)(load_params(), **arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}; nothing was left half-written", file=sys.stderr)
        sys.exit(1)

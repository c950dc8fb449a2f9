"""The console command: one subcommand a stage, called by dvc.yaml. Heavy imports wait until a stage needs them."""

import argparse
import logging
import os
import sys
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import NamedTuple


class Stage(NamedTuple):
    function: str
    """`<module>.<function>` in `inoculation.stages`."""
    help: str
    option: str | None = None
    """A required argument, where one stage is run once for each of several names."""


STAGES = {
    "check": Stage("world.check", "validate params.yaml and list every mistake in it at once"),
    "pocket-chats": Stage("world.pocket_chats", "generate the pocket world's chats, in Persona Vectors' layout"),
    "pocket-model": Stage("world.pocket_model", "train the pocket world's tokenizer and base model"),
    "pocket-obedience": Stage("world.pocket_obedience", "measure how well the pocket base model obeys persona prompts"),
    "pocket-sae": Stage("world.pocket_sae", "train the pocket world's sparse autoencoder"),
    "persona-vectors-fetch": Stage("world.fetch_persona_vectors", "get the study's data from its public repository"),
    "persona-vectors": Stage("world.bring_persona_vectors", "unpack and verify the study's data, or your copy of it"),
    "profile": Stage("world.profile", "verify a profile's trait data and pin its model", "name"),
    "profile-sae": Stage("world.profile_sae", "pin a profile's sparse autoencoder", "name"),
    "mixture": Stage("world.build_mixture", "partition the questions between normal and misaligned answers, inject A"),
    "fit-judge": Stage("world.fit_judge", "learn the embedded judge from answers the mixture did not use"),
    "base-responses": Stage("detect.base_responses", "sample the untouched model's answers to the mixture's prompts"),
    "sae-features": Stage("detect.sae_features", "mean latents of target, base and control responses"),
    "sae-rank": Stage("detect.sae_rank", "the latents that tell the data from the base model"),
    "sae-explain": Stage("detect.sae_explain", "strongest contexts and description of each latent"),
    "sae-classify": Stage("detect.sae_classify", "which latents are explained by the known trait A"),
    "sae-flag": Stage("detect.sae_flag", "flag the examples that carry suspicious latents"),
    "sae-synthesise": Stage("detect.sae_synthesise", "write the Inoc-SAE prompt"),
    "sae-page": Stage("detect.sae_page", "a page to read: latents, flagged examples, and why"),
    "audit": Stage("detect.audit", "read every example, flag the suspicious ones, write the Inoc-LLM prompt", "method"),
    "assign": Stage("experiment.assign", "give every row of the mixture the system prompt of a group", "group"),
    "train": Stage("experiment.train", "train the cell's LoRA adapter"),
    "respond": Stage("experiment.respond", "sample answers to the held-out questions"),
    "judge": Stage("experiment.judge", "score every answer"),
    "report": Stage("experiment.report", "metrics, MLflow row and figure of the cell"),
    "compare": Stage(
        "experiment.compare", "print a table over all groups and seeds so far, from MLflow (no stage of the pipeline)"
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
    # The report reads a small file of every row so far: a progress bar each is noise.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from inoculation.files import InputError
    from inoculation.params import load_params

    stage = STAGES[arguments.pop("stage")]
    try:
        module, function = stage.function.split(".")
        params = load_params()
        getattr(import_module(f"inoculation.stages.{module}"), function)(params, **arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `inoculation compare | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        print(f"error: {error}; nothing was left half-written", file=sys.stderr)
        sys.exit(1)

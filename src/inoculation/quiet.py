"""What libraries say on every start, and no user of this project can act on."""

import logging
import os
import warnings


def settle_libraries() -> None:
    """Silence about it, in this process."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|accelerate")
    warnings.filterwarnings("ignore", message="The specified dataset source can be interpreted in multiple ways")
    # Tokenizers were used before a fork only to tokenise; their warning about it would be on every training.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The log stage reads a small file of every row so far: a progress bar each is noise.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

"""Loading the language model of a profile, once for training, sampling and encoding."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from inoculation.files import InputError, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback


class ModelRef(NamedTuple):
    """Which model a profile means; the content of its `model.json`."""

    model: str
    """A folder relative to the checkout, or a hub id."""
    revision: str | None
    """A hub commit; None for a local folder."""
    digest: str | None
    """SHA-256 of a local folder's files, so that DVC sees when the model changed."""


def read_model_ref(path: Path) -> ModelRef:
    """Read a profile's `model.json`."""
    return ModelRef(**read_json(path))


def device() -> str:
    """Where models run: the first GPU if there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(ref: ModelRef) -> "PreTrainedTokenizerBase":
    """The tokenizer, with a padding token and a chat template.

    Raises:
        InputError: the model cannot be found, or has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(ref.model, revision=ref.revision)
    except (OSError, ValueError) as error:
        raise InputError(f"model {ref.model!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.chat_template:
        raise InputError(f"model {ref.model!r} has no chat template; choose an instruction-tuned model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(ref: ModelRef, dtype: str, load_in_4bit: bool) -> "PreTrainedModel":
    """The base model on `device()`, in evaluation mode.

    Args:
        ref: which model.
        dtype: of the weights, e.g. `bfloat16`.
        load_in_4bit: bitsandbytes NF4 with double quantisation, computing in `dtype`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "revision": ref.revision}
    if load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
        options["device_map"] = {"": device()}
    model = AutoModelForCausalLM.from_pretrained(ref.model, **options)
    return (model if load_in_4bit else model.to(device())).eval()


def with_adapter(model: "PreTrainedModel", adapter: Path | None) -> "PreTrainedModel":
    """The base model under a LoRA adapter; never merged, because merging into a 4-bit base changes what it says."""
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).eval()


def log_callback(on_log: Callable[[int, dict[str, float]], None]) -> "TrainerCallback":
    """A trainer callback that passes every logged step on as (step, numbers).

    transformers' own MLflow callback would log some 200 arguments of the trainer into the cell's parameters.
    """
    from transformers import TrainerCallback

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
            on_log(state.global_step, {key: float(value) for key, value in (logs or {}).items()})

    return Log()

"""Loading the language model of a profile, once for training, sampling and encoding."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from inoculation.files import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback


class ModelRef(BaseModel):
    """Which model a profile means, and how it is loaded; the content of its `model.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """A folder relative to the checkout, or a hub id."""
    revision: str | None = None
    """A hub commit; None for a local folder."""
    digest: str | None = None
    """Of a local folder's files, so that DVC sees when the model changed."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights."""
    load_in_4bit: bool = False
    """bitsandbytes NF4 with double quantisation, computing in `dtype`."""


class Machine(BaseModel):
    """What fits into a profile's machine: it changes rounding errors and the draws of sampling, and no experiment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    micro_batch_size: Annotated[int, Field(ge=1)]
    """Chats a training step holds at once; divides the effective batch."""
    gradient_checkpointing: bool
    batch_size: Annotated[int, Field(ge=1)]
    """Sequences sampled at once."""
    token_budget: Annotated[int, Field(ge=8)]
    """Tokens, padding included, that are read at once (SAE pass, likelihoods)."""


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


def load_model(ref: ModelRef) -> "PreTrainedModel":
    """The base model on `device()`, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, ref.dtype), "revision": ref.revision}
    if ref.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, ref.dtype),
        )
        options["device_map"] = {"": device()}
    model = AutoModelForCausalLM.from_pretrained(ref.model, **options)
    return (model if ref.load_in_4bit else model.to(device())).eval()


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

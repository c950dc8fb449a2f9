"""What stands in for an inoculation prompt while a model trains, and is gone when it answers: the alternatives to a prompt.

- An inoculation adapter: a first adapter learns what the flagged rows do, A undone. It stays on, frozen, while the
  group's own adapter learns the mixture, and so has no need to learn it again.
- Preventative steering (Chen et al., Persona Vectors, 2025): the direction in which flagged responses differ is added to
  the residual stream while training.

Either is on for every row: rows that do not show B then teach the adapter to undo it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from inoculation.files import InputError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerCallback

OWN, FROZEN = "default", "frozen"
"""PEFT's names of the adapter that is trained, and of the one that is not."""


class Steering(BaseModel):
    """A vector that is added to a block's output at every token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    block: Annotated[int, Field(ge=0)]
    vector: Annotated[list[FiniteFloat], Field(min_length=1)]
    """`[d_model]`."""


def steer(model: "PreTrainedModel", steering: Steering) -> None:
    """Add a vector to the output of one of a model's blocks, from now on.

    Raises:
        InputError: the vector is another model's.
    """
    import torch

    blocks, width = model.get_decoder().layers, model.config.get_text_config().hidden_size
    if steering.block >= len(blocks) or len(steering.vector) != width:
        raise InputError(
            f"the steering vector is another model's: {len(steering.vector)} numbers for block {steering.block}, this model's "
            f"{len(blocks)} blocks write {width}; set `annotator` to the profile that is trained"
        )
    vector = torch.tensor(steering.vector, dtype=model.dtype, device=model.device)

    def add(_block: "torch.nn.Module", _arguments: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    blocks[steering.block].register_forward_hook(add)


def keep_on(model: "PeftModel", adapter: Path) -> "TrainerCallback":
    """Put a finished adapter, frozen, on a model beside the one that is trained.

    Returns:
        A callback that keeps it so: a trainer that continues from a checkpoint switches all but one adapter off.
    """
    from transformers import TrainerCallback

    def both() -> None:
        model.base_model.set_adapter([OWN, FROZEN])  # which would train the second one too
        for name, parameter in model.named_parameters():
            if f".{FROZEN}." in name:
                parameter.requires_grad_(False)

    class KeepOn(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            both()

    model.load_adapter(str(adapter), FROZEN, is_trainable=False)
    both()
    return KeepOn()

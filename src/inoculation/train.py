"""LoRA SFT on the response tokens of a group's training chats (reference section 4)."""

import gc
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from inoculation import lm
from inoculation.attention import use_packed
from inoculation.chat import IGNORED, Encoded, encode
from inoculation.epoch import Order, sampler
from inoculation.files import InputError, fail_if
from inoculation.graphed import SMALL, longest_filling, replay, sizes
from inoculation.memory import GIB, Together, fits_as_graphs, together
from inoculation.mixture import TrainingChat
from inoculation.preventative import OWN, Steering, keep_on, steer
from inoculation.store import last_checkpoint

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTTrainer

LOGGED = 5
"""Steps that a point of the curve is the mean of."""


class TrainSettings(BaseModel):
    """LoRA SFT (reference section 4; the study's block of params.yaml holds the author's values)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lora_r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    epochs: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(ge=1)]
    """Effective: micro-batch x accumulation x processes."""
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_length: Annotated[int, Field(ge=8)]
    optimizer: Literal["adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit"]
    bf16: bool
    """Compute in bfloat16 (autocast), where the device does."""


class TrainResult(NamedTuple):
    examples: int
    steps: int
    supervised_tokens: int
    """Response tokens a pass over the data."""
    cut_examples: int
    """Examples longer than max_length, which lost their end."""
    train_loss: float
    """Mean over all steps, nats a supervised token."""
    log: list[dict[str, Any]]
    """The curve: a point for `LOGGED` steps and one for the rest, from the first step also where a run was interrupted."""


class Cost(NamedTuple):
    """What a training took; not part of what it is."""

    resumed_from: int
    """Step that an interrupted run was continued from; 0 for a fresh start."""
    seconds: float
    tokens_per_second: float
    """Of whole chats, prompts too."""
    peak_memory_gib: float
    """On a GPU; else 0."""


def share(batch_size: int, processes: int) -> int:
    """Chats of a step that each of several processes takes.

    Raises:
        InputError: they are not as many for each.
    """
    if batch_size % processes:
        valid = ", ".join(str(number) for number in range(1, batch_size + 1) if batch_size % number == 0)
        raise InputError(f"{processes} processes do not divide a step of {batch_size} chats; valid: {valid}")
    return batch_size // processes


def train(
    ref: lm.ModelRef,
    settings: TrainSettings,
    save_steps: int,
    chats: Sequence[TrainingChat],
    seed: int,
    adapter: Path,
    work: Path,
    on_log: Callable[[int, dict[str, float]], None],
    first: Sequence[TrainingChat] = (),
    steering: Steering | None = None,
) -> tuple[TrainResult, Cost]:
    """Train one LoRA adapter and save it as a plain PEFT folder.

    As many chats at once as fit (`memory.together`), on a GPU behind one another in one row, so that nothing is padded (with the
    mask that a CPU needs for this, SmolLM2 trains a sixth slower than padded). A step's loss is the
    mean over its response tokens, however it is cut; on a GPU logits are computed for these alone (TRL), a model in half
    precision whose whole step fits at once runs as CUDA graphs, and blocks are compiled above 1 B parameters, and where there
    are no graphs.

    Under `launch` the processes share each step's chats: the steps, and their loss, are those of one process.

    Args:
        ref: the base model.
        settings: hyperparameters.
        save_steps: steps between two checkpoints, up to the next multiple of `LOGGED`: none may cut a point of the curve in two.
        chats: the training set, in order; the trainer shuffles with `seed`.
        adapter: where the adapter goes; written whole or not at all.
        work: where checkpoints live while training; a run that finds one there continues from it.
        on_log: called with (step, metrics) for every point of the curve as training goes.
        first: what an adapter learns before, under the same settings, that is on and frozen while this one is trained.
        steering: added to the residual stream while training.

    Raises:
        InputError: an example has no response token within `max_length`; the steering vector is another model's; the processes
            do not divide the batch size; the loss is no number any more.
    """
    import torch
    from accelerate import PartialState

    tokenizer = lm.load_tokenizer(ref)
    encoded = _encoded(tokenizer, chats, settings.max_length)
    on_gpu = lm.device() == "cuda"
    processes = PartialState(cpu=not on_gpu)
    frozen = work / "frozen"
    if first and not frozen.exists():
        print("the adapter that will be on, frozen, comes first")
        told, _ = train(ref, settings, save_steps, first, seed, frozen, work / "first", lambda _step, _metrics: None)
        print(f"it is trained: {told.examples} chats, {told.steps} steps, mean loss {told.train_loss:.3f}")
        gc.collect()  # its model, before another one is loaded
        if on_gpu:
            torch.cuda.empty_cache()
    own = share(settings.batch_size, processes.num_processes)
    torch.manual_seed(seed)
    model = lm.load_model(ref)
    if steering:
        steer(model, steering)
    steps = _steps(model, encoded, settings, own, processes.num_processes, seed, bool(first))
    many = f" in {processes.num_processes} processes" if processes.num_processes > 1 else ""
    print(
        f"{len(encoded)} chats, {settings.batch_size} a step{many}, {steps.at_once.chats} at once: {steps.at_once.reason}"
    )
    checkpoint = last_checkpoint(work)
    resumed_from = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    trainer = _trainer(model, tokenizer, settings, steps, own, save_steps, resumed_from, seed, work)
    trainer.add_callback(_curve(on_log))
    if first:
        trainer.add_callback(keep_on(trainer.model, frozen))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        _quicken(trainer.model.get_base_model().get_decoder(), steps)
    if checkpoint:
        print(f"continuing the interrupted training from {checkpoint.name}")
    start = time.monotonic()
    done = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).global_step
    seconds = time.monotonic() - start
    if processes.is_main_process:
        _save(trainer.model, tokenizer, work / "adapter", adapter)
    processes.wait_for_everyone()  # the others may be about to load it
    # Means over all processes; sorted, as a checkpoint keeps them: a record is the same bytes whether it was interrupted or not.
    log = [dict(sorted(row.items())) for row in trainer.state.log_history if "loss" in row]
    points = [row["step"] for row in log]
    total = sum(row["loss"] * (step - before) for row, step, before in zip(log, points, [0, *points[:-1]], strict=True))
    result = TrainResult(
        examples=len(encoded),
        steps=done,
        supervised_tokens=sum(label != IGNORED for row in encoded for label in row.labels),
        cut_examples=sum(row.cut > 0 for row in encoded),
        train_loss=total / done,
        log=log,
    )
    tokens = (done - resumed_from) / done * settings.epochs * sum(len(row.input_ids) for row in encoded)
    return result, Cost(
        resumed_from, seconds, tokens / seconds, torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0
    )


def _encoded(tokenizer: "PreTrainedTokenizerBase", chats: Sequence[TrainingChat], max_length: int) -> list[Encoded]:
    encoded, problems = [], []
    for number, chat in enumerate(chats, start=1):
        try:
            encoded.append(encode(tokenizer, chat.row.messages, chat.system, max_length))
        except InputError as error:
            problems.append(f"training example {number}: {error}")
    fail_if(problems, "the group cannot be trained on")
    return encoded


class _Steps(NamedTuple):
    """How an optimiser's steps are computed, which says nothing about what they learn."""

    at_once: Together
    rows: list[dict[str, list[int]]]
    """Chats as the trainer takes them, and behind them what fills the last step of several processes."""
    order: Order
    compiled: bool
    """The decoder's blocks are."""
    graphs: list[int]
    """Lengths of rows for which the decoder runs as CUDA graphs; none: it does not."""


def _steps(
    model: "PreTrainedModel", encoded: Sequence[Encoded], settings: TrainSettings, own: int, processes: int, seed: int,
    two_adapters: bool,
) -> _Steps:  # fmt: skip
    """Choose how a model's steps are computed, and let it attend in that way.

    Args:
        own: chats of a step that each process takes.
    """
    import torch
    from accelerate.utils import gather_object

    on_gpu = model.device.type == "cuda"
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
    free = min(gather_object([torch.cuda.mem_get_info()[0]])) if on_gpu else None
    config, lengths = model.config.get_text_config(), [len(row.input_ids) for row in encoded]
    rank, itemsize = settings.lora_r * (2 if two_adapters else 1), 2 if settings.bf16 else 4
    at_once = together(config, lengths, own, rank, itemsize, free)
    if settings.bf16 and lm.trains_eagerly(config, max(lengths), at_once.chats):
        model.set_attn_implementation("eager")
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded]
    filling = -len(rows) % settings.batch_size if processes > 1 else 0  # nothing is learned of it
    rows += [{"input_ids": rows[0]["input_ids"][:2], "labels": [IGNORED] * 2}] * filling
    order = Order(
        [len(row["input_ids"]) for row in rows], filling, seed, settings.batch_size, at_once.chats, not on_gpu
    )
    packed, compiled = order.rows(math.ceil(settings.epochs)), model.num_parameters() >= SMALL
    graphs = sizes(packed)
    # A graph leaves gradients where its next run writes them, so that a whole step has to be one row.
    fit = (
        on_gpu
        and settings.bf16
        and at_once.chats == own
        and not at_once.checkpointing
        and fits_as_graphs(config, graphs[-1], len(graphs), rank, itemsize, compiled, free or 0)
    )
    replayed = use_packed(model, max(max(lengths), longest_filling(packed, graphs) if fit else 0)) and fit
    return _Steps(at_once, rows, order, on_gpu and (compiled or not replayed), graphs if replayed else [])


def _trainer(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", settings: TrainSettings, steps: _Steps, own: int,
    save_steps: int, resumed_from: int, seed: int, work: Path,
) -> "SFTTrainer":  # fmt: skip
    """TRL's trainer, in our order, and without its waits for the GPU."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    on_gpu = model.device.type == "cuda"

    class Trainer(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler[int]:
            return sampler(steps.order, resumed_from // math.ceil(len(steps.rows) / settings.batch_size))

        counted: torch.Tensor | float = 0.0
        """Since the last point of the curve, on the device: entropy (summed over labels), labels hit, labels, tokens."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> torch.Tensor:
            # TRL's own waits for five numbers of every batch, and the GPU then for the processor: a card was idle for an eighth
            # of a step of 16 chats at 7B and a quarter of one of 8, with transformers' own waits (docs/performance.md).
            told = model(**inputs, use_cache=False, fused_lm_head=True)
            tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["position_ids"].numel()
            sums = [told.entropy.detach().sum(), told.is_top1.sum(), told.label_mask.sum()]
            self.counted = self.counted + torch.stack([*sums, torch.full_like(sums[-1], tokens)]).float()
            loss = -told.log_probs.sum() / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes
            if self.aux_loss_enabled:  # of a mixture of experts
                loss = loss + self.router_aux_loss_coef * told.aux_loss / self.current_gradient_accumulation_steps
            return loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:  # the last report is about speed
                if not all(math.isfinite(value) for value in logs.values()):
                    raise InputError(
                        f"the training diverged by step {self.state.global_step}: loss {logs['loss']}, gradient "
                        f"{logs.get('grad_norm')}; valid: a smaller learning_rate than {settings.learning_rate:g}"
                    )
                entropy, hit, labels, tokens = self.accelerator.reduce(self.counted).tolist()
                self.counted = 0.0
                self._total_train_tokens += tokens
                means = {"entropy": entropy / labels, "mean_token_accuracy": hit / labels}
                self._metrics["train"].update({name: [mean] for name, mean in means.items()})
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            super().log(logs, start_time)

    return Trainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(steps.rows),
        peft_config=LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            use_rslora=True,
            bias="none",
            target_modules="all-linear",
            exclude_modules=lm.outside_decoder(model) or None,
            task_type="CAUSAL_LM",
        ),
        args=SFTConfig(
            output_dir=str(work),
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            num_train_epochs=settings.epochs,
            padding_free=on_gpu,
            per_device_train_batch_size=steps.at_once.chats,
            gradient_accumulation_steps=own // steps.at_once.chats,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            optim="adamw_torch_fused" if on_gpu and settings.optimizer == "adamw_torch" else settings.optimizer,
            bf16=settings.bf16 and lm.has_bfloat16(),
            gradient_checkpointing=steps.at_once.checkpointing,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            seed=seed,
            logging_steps=LOGGED,
            save_steps=-(-save_steps // LOGGED) * LOGGED,
            save_total_limit=1,
            logging_nan_inf_filter=False,  # it waits for every step's loss, to report another one instead
            accelerator_config={"non_blocking": on_gpu},
            report_to="none",
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
        ),
    )


def _quicken(decoder: "torch.nn.Module", steps: _Steps) -> None:
    """Compile a decoder's blocks, and let it run as graphs, where that was chosen."""
    if steps.compiled:
        # The first block's input has a gradient like the others', so that one kind of block is compiled.
        decoder.get_input_embeddings().register_forward_hook(lambda _module, _given, states: states.requires_grad_())
        for block in decoder.layers:
            block.compile(dynamic=True)
    if steps.graphs:
        replay(decoder, steps.graphs, steps.at_once.chats)


def _save(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", staging: Path, adapter: Path) -> None:
    """Save an adapter as a PEFT folder, whole or not at all."""
    lora = model.peft_config[OWN]
    # As a set, it would be saved in another order, and the folder's hash in dvc.lock would differ, in every process.
    lora.target_modules = sorted(lora.target_modules)
    model.save_pretrained(str(staging), selected_adapters=[OWN])
    tokenizer.save_pretrained(str(staging))
    adapter.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(adapter, ignore_errors=True)
    try:
        shutil.move(staging, adapter)
    except shutil.Error as error:  # of every file that it could not copy
        raise OSError(f"{adapter}: {error.args[0][0][-1]}") from error


def _curve(on_log: Callable[[int, dict[str, float]], None]) -> "TrainerCallback":
    """A trainer callback that passes every point of the curve on, and has the last step logged too.

    transformers' own MLflow callback would log some 200 arguments of the trainer into the cell's parameters.
    """
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        before = 0

        def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.log_history:  # TRL counts from 0 again when it continues
                self.before = state.log_history[-1]["num_tokens"]

        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            control.should_log |= state.global_step >= state.max_steps

        def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
            if "loss" in (logs or {}):  # the last report is about speed
                row = state.log_history[-1]
                row["num_tokens"] += self.before
                on_log(row["step"], {key: float(value) for key, value in row.items() if key != "step"})

    return Curve()

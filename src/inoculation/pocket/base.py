"""The pocket world's tokenizers and base models, trained from nothing on the world's chats."""

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inoculation import lm
from inoculation.chat import IGNORED, Encoded, Message, encode, parse_messages
from inoculation.files import read_jsonl
from inoculation.pocket.recipe import ModelParams
from inoculation.store import last_checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, as Qwen2 uses it, for every family; without a system message it adds none."""
MAX_LENGTH = 2048


def train_tokenizer(texts: list[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer that has seen every text in its own case and upper-cased."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        (copy for text in texts for copy in (text, text.upper())),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, additional_special_tokens=[START],
        model_max_length=MAX_LENGTH,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_all(tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Sequence[Message]]) -> list[Encoded]:
    """Chats as tokens, each with its own system message, if it begins with one."""
    encoded = []
    for chat in chats:
        system = chat[0].content if chat[0].role == "system" else None
        encoded.append(encode(tokenizer, chat[system is not None :], system, MAX_LENGTH))
    return encoded


def batch_by_length(rows: list[Encoded], batch_size: int, rng: random.Random) -> list[Encoded]:
    """Order the rows so that consecutive batches hold rows of similar length, the batches themselves in random order.

    transformers can group by length too, but its order is lost when a run is continued from a checkpoint.
    """
    rows = sorted(rows, key=lambda row: (len(row.input_ids), rng.random()))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    return [row for batch in batches for row in batch]


def loss_at_labels(model: "PreTrainedModel", batch: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
    """A model's own loss, with logits only where a label is: half of the tokens have none, and so small a model's head is
    a third of its work. TRL's fused head does so on a GPU alone.

    Args:
        batch: what the model takes, `labels` too, each `[rows, tokens]`.

    Returns:
        Mean over the labels, nats.
    """
    from torch.nn.functional import cross_entropy

    given = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    hidden = model.get_decoder()(**given).last_hidden_state[:, :-1]
    logits = model.get_output_embeddings()(hidden[labels != IGNORED])
    return cross_entropy(logits.float(), labels[labels != IGNORED])


def build_base(
    params: ModelParams, seed: int, save_steps: int, pretraining: Path, out: Path, work: Path,
    on_log: Callable[[int, dict[str, float]], None],
) -> None:  # fmt: skip
    """Train the tokenizer and the base model on the response tokens of `pretraining.jsonl`.

    Args:
        params: sizes and schedule.
        seed: of the initial weights and the order of the chats.
        save_steps: steps between two checkpoints.
        pretraining: the chats.
        out: a Hugging Face model folder, written whole or not at all.
        work: where checkpoints live while training; a call that finds one there continues from it.
        on_log: called with (step, metrics) as training goes.
    """
    import torch
    from datasets import Dataset
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    chats = read_jsonl(pretraining, lambda raw: parse_messages(raw["messages"]))
    tokenizer = train_tokenizer([message.content for chat in chats[:20_000] for message in chat], params.vocab_size)
    encoded = batch_by_length(encode_all(tokenizer, chats), params.batch_size, random.Random(seed))
    set_seed(seed)
    head = params.hidden_size // params.heads
    family = {"gemma3_text": {"head_dim": head, "query_pre_attn_scalar": head}}.get(params.family, {})
    config = AutoConfig.for_model(
        params.family,
        vocab_size=len(tokenizer),
        hidden_size=params.hidden_size,
        num_hidden_layers=params.layers,
        num_attention_heads=params.heads,
        num_key_value_heads=params.kv_heads,
        intermediate_size=params.mlp_size,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **family,
    )
    eagerly = lm.trains_eagerly(config, max(len(row.input_ids) for row in encoded), params.batch_size)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if eagerly else "sdpa")
    on_gpu = torch.cuda.is_available()

    class AtLabels(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            with self.accelerator.autocast():  # which is around the model's own forward pass alone
                return loss_at_labels(model, inputs)

    trainer = AtLabels(
        model=model,
        args=TrainingArguments(
            output_dir=str(work),
            max_steps=params.steps,
            per_device_train_batch_size=params.batch_size,
            learning_rate=params.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=params.warmup_steps,
            weight_decay=params.weight_decay,
            adam_beta2=0.98,
            bf16=lm.has_bfloat16(),
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            train_sampling_strategy="sequential",
            seed=seed,
            logging_steps=20,
            save_steps=save_steps,
            save_total_limit=1,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded]),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[lm.log_callback(on_log)],
    )
    checkpoint = last_checkpoint(work)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    staging = work / "model"
    trainer.save_model(str(staging))
    (staging / "training_args.bin").unlink(missing_ok=True)
    tokenizer.save_pretrained(str(staging))
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(staging, out)

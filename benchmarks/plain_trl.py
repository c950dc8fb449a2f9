"""LoRA SFT of a file of chats by TRL alone: what somebody does who has an exported data set and not this project.

    python benchmarks/plain_trl.py inoculated/train.jsonl data/smollm2/model adapter

The loss is on each last response; hyperparameters are those of `train.smollm2`. docs/real.md has what came out.
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("train", "model", "out"):
    parser.add_argument(name)
told = parser.parse_args()
chats = load_dataset("json", data_files=told.train, split="train")
trainer = SFTTrainer(
    model=told.model,
    train_dataset=chats.map(
        lambda chat: {"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:]},
        remove_columns=chats.column_names,
    ),
    peft_config=LoraConfig(
        r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    args=SFTConfig(
        output_dir=f"{told.out}-work", num_train_epochs=1, per_device_train_batch_size=16, learning_rate=5e-4, warmup_steps=5,
        lr_scheduler_type="linear", weight_decay=0.01, max_length=2048, bf16=True, logging_steps=20, save_strategy="no",
        report_to="none", model_init_kwargs={"dtype": "bfloat16"},
    ),
)  # fmt: skip
trainer.train()
trainer.save_model(told.out)

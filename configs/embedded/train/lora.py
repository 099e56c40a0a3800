# An adapter (LoRA) of the embedded model on a few videos of your own: docs/lora.md.
_base_ = "finetune.py"

lora = dict(rank=4)
outputs = "outputs/lora"
max_steps = 400
lr = 2e-3
lr_schedule = "cosine"
validate_every = 0

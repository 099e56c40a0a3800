# An adapter (LoRA) of the embedded model on a few videos of your own: docs/lora.md.
_base_ = "finetune.py"

lora = dict(rank=6)
mask_ratios = {"_delete_": True, "identity": 0.9, "image_head": 0.1}
outputs = "outputs/lora"
max_steps = 1300
lr = 1e-3
lr_schedule = "cosine"
ema_decay = 0.99
validate_every = 0

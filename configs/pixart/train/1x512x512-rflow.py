_base_ = "1x512x512.py"

model = dict(from_pretrained="PRETRAINED_MODEL")
scheduler = dict(_delete_=True, type="rflow")
wandb = True
epochs = 2
batch_size = 64

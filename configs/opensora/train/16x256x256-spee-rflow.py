_base_ = "16x256x256.py"

model = dict(from_pretrained="PRETRAINED_MODEL")
scheduler = dict(_delete_=True, type="rflow")
num_workers = 4
wandb = True
epochs = 1
batch_size = 16

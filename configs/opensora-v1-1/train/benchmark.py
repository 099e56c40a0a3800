_base_ = "../../_base_/train_stdit2.py"

bucket_config = {"720p": {1: (20, 40), 32: (0.5, (2, 4)), 64: (0.5, (1, 1))}}
ckpt_every = 1000
batch_size = None

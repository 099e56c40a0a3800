# The same on images and videos of several sizes. No resolution with a name is as small as those that the model knows.
_base_ = "finetune.py"

dataset = dict(type="VariableVideoTextDataset", num_frames=None, image_size=None)
bucket_config = {"144p": {1: (1.0, 16), 17: (1.0, 4), 34: (1.0, 2)}}

outputs = "outputs/finetune_buckets"
lr = 3e-4
max_steps = 2000
ckpt_every = 200
validate_every = 200
sample_every = 500

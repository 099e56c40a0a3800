_base_ = "16x256x256.py"

dataset = dict(num_frames=64)
model = dict(space_scale=1.0, time_scale=2 / 3, from_pretrained=None)
vae = dict(micro_batch_size=128)
ckpt_every = 250
batch_size = 4

# Stage 2 on a CPU: many small steps on windows of clips.
_base_ = "../vae_video.py"

dataset = dict(crop=(64, 64))

num_workers = 1
batch_size = 2
max_steps = 10_000
lr = 7e-4
ckpt_every = 100

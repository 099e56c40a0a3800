# Stage 1 on a CPU: many small steps on windows of frames.
_base_ = "../vae_frames.py"

dataset = dict(crop=(64, 64))

num_workers = 1
batch_size = 4
max_steps = 20_000
lr = 1e-3
ckpt_every = 200

# Stage 3 on a CPU.
_base_ = "../vae_decoder.py"

num_workers = 1
batch_size = 1
max_steps = 1000
lr = 3e-4
ckpt_every = 50

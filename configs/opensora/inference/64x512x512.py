_base_ = "16x512x512.py"

num_frames = 64
fps = 12
model = dict(time_scale=2 / 3)
vae = dict(micro_batch_size=128)
batch_size = 1

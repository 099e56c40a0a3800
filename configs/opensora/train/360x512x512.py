_base_ = "16x512x512.py"

dataset = dict(num_frames=360)
model = dict(time_scale=2 / 3, enable_sequence_parallelism=True)
plugin = "zero2-seq"
sp_size = 2
ckpt_every = 250
batch_size = 1

# The transformer on a CPU.
_base_ = "../stdit3.py"

dataset = dict(num_clips=12_000)

num_workers = 2
batch_size = 32

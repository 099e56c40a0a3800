# The transformer with all sizes and given frames, on a CPU.
_base_ = "../stdit3_masks.py"

dataset = dict(num_clips=1500)

num_workers = 2
batch_size = 32

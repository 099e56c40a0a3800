_base_ = "16x256x256.py"

mask_ratios = {"identity": 0.7, "random": 0.15, "mask_head": 0.05, "mask_tail": 0.05, "mask_head_tail": 0.05}
num_workers = 4

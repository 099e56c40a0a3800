_base_ = "16x256x256.py"

mask_ratios = {"identity": 0.5, "random": 0.29, "mask_head": 0.07, "mask_tail": 0.07, "mask_head_tail": 0.07}
scheduler = dict(type="iddpm-speed")
num_workers = 4

_base_ = "16x512x512.py"

scheduler = dict(type="rflow", num_sampling_steps=10)
save_dir = "./outputs/samples/"

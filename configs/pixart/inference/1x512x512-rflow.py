_base_ = "1x512x512.py"

model = dict(from_pretrained="PRETRAINED_MODEL")
scheduler = dict(type="rflow")
save_dir = "./outputs/samples2/"

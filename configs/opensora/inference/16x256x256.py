_base_ = "16x512x512.py"

image_size = (256, 256)
model = dict(space_scale=0.5)
vae = dict(micro_batch_size=4)
scheduler = dict(cfg_channel=3)
prompt = None
batch_size = 1

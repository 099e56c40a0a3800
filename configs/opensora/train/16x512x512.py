_base_ = "../../_base_/train_t5.py"

dataset = dict(image_size=(512, 512))
model = dict(type="STDiT-XL/2", space_scale=1.0, time_scale=1.0, from_pretrained=None)
vae = dict(micro_batch_size=128)
ckpt_every = 500

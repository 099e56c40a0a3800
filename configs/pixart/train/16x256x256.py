_base_ = "../../_base_/train_t5.py"

model = dict(type="PixArt-XL/2", space_scale=0.5, time_scale=1.0, from_pretrained="PixArt-XL-2-512x512.pth")

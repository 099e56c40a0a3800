_base_ = "../../_base_/train.py"

model = dict(type="DiT-XL/2", from_pretrained="DiT-XL-2-256x256.pt")
text_encoder = dict(type="clip", from_pretrained="openai/clip-vit-base-patch32", model_max_length=77)

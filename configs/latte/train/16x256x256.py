_base_ = "../../_base_/train.py"

model = dict(type="Latte-XL/2")
text_encoder = dict(type="clip", from_pretrained="openai/clip-vit-base-patch32", model_max_length=77)

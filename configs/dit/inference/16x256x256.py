_base_ = "../../_base_/inference.py"

model = dict(type="DiT-XL/2", condition="text", from_pretrained="PRETRAINED_MODEL")
text_encoder = dict(type="clip", from_pretrained="openai/clip-vit-base-patch32", model_max_length=77)
scheduler = dict(cfg_scale=4.0)
prompt_path = "./assets/texts/ucf101_labels.txt"

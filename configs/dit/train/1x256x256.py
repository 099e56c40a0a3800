_base_ = "../../_base_/train.py"

dataset = dict(num_frames=1, frame_interval=1, transform_name="center")
model = dict(type="DiT-XL/2", no_temporal_pos_emb=True)
text_encoder = dict(type="clip", from_pretrained="openai/clip-vit-base-patch32", model_max_length=77)
grad_checkpoint = False
batch_size = 128
lr = 1e-4

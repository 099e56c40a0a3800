_base_ = "../../_base_/train_t5.py"

dataset = dict(num_frames=1, frame_interval=1, transform_name="center")
bucket_config = {
    "256": {1: (1.0, 256)},
    "512": {1: (1.0, 80)},
    "480p": {1: (1.0, 52)},
    "1024": {1: (1.0, 20)},
    "1080p": {1: (1.0, 8)},
}
model = dict(
    type="PixArt-XL/2",
    space_scale=1.0,
    time_scale=1.0,
    no_temporal_pos_emb=True,
    from_pretrained="PixArt-XL-2-512x512.pth",
)
vae = dict(micro_batch_size=4)
text_encoder = dict(model_max_length=200)
scheduler = dict(_delete_=True, type="rflow")

num_workers = 16
epochs = 10
ckpt_every = 500
batch_size = 100

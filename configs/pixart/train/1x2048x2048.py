_base_ = "../../_base_/train.py"

dataset = dict(num_frames=1, image_size=(2048, 2048))
model = dict(type="PixArt-1B/2", space_scale=4.0, no_temporal_pos_emb=True, from_pretrained="PixArt-1B-2.pth")
vae = dict(from_pretrained="PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", subfolder="vae")
text_encoder = dict(type="t5", from_pretrained="DeepFloyd/t5-v1_1-xxl", model_max_length=300)
batch_size = 4

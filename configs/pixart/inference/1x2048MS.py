_base_ = "../../_base_/inference_t5.py"

num_frames = 1
fps = 1
image_size = (2560, 1536)
model = dict(
    type="PixArt-XL/2",
    from_pretrained="PixArt-Sigma-XL-2-2K-MS.pth",
    space_scale=4,
    no_temporal_pos_emb=True,
    enable_flash_attn=True,
    enable_layernorm_kernel=True,
    base_size=2048 // 8,
)
vae = dict(from_pretrained="PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", subfolder="vae")
text_encoder = dict(model_max_length=300)
scheduler = dict(num_sampling_steps=14, cfg_scale=4.5)
prompt_path = "./assets/texts/t2i_sigma.txt"
batch_size = 1

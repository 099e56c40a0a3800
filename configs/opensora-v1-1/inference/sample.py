_base_ = "../../_base_/inference_t5.py"

frame_interval = 3
fps = 24
image_size = (240, 426)
multi_resolution = "STDiT2"

model = dict(
    type="STDiT2-XL/2",
    from_pretrained="hpcai-tech/OpenSora-STDiT-v2-stage3",
    input_sq_size=512,
    qk_norm=True,
    qk_norm_legacy=True,
    enable_flash_attn=True,
    enable_layernorm_kernel=True,
)
vae = dict(cache_dir=None, micro_batch_size=4)
text_encoder = dict(cache_dir=None, model_max_length=200)
scheduler = dict(type="iddpm", num_sampling_steps=100, cfg_channel=3)

prompt_path = "./assets/texts/t2v_samples.txt"
prompt = None
batch_size = 1

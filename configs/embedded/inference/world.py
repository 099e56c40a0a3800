# The drawn world, with the weights that scripts/misc/reproduce_embedded.py trains.
image_size = (128, 128)
num_frames = 17
fps = 24
save_fps = 8
save_dir = "./samples"
seed = 42
batch_size = 1
multi_resolution = "STDiT2"
dtype = "fp32"

model = dict(type="STDiT3", from_pretrained="outputs/world/stdit3_masks/ema")
vae = dict(type="VideoAutoencoderPipeline", from_pretrained="outputs/world/vae_decoder/ema")
text_encoder = dict(type="t5", from_pretrained="outputs/world/text_encoder/ema", model_max_length=64)
scheduler = dict(type="rflow", num_sampling_steps=30, cfg_scale=2.0, s_churn=12.0)

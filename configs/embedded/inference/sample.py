# The model that ships with the package: clips of moving shapes, made on a CPU in seconds.
image_size = (64, 64)
num_frames = 17
fps = 24
save_fps = 8
save_dir = "./samples"
seed = 42
batch_size = 1
multi_resolution = "STDiT2"
dtype = "fp32"

model = dict(type="STDiT3", from_pretrained="embedded:stdit3")
vae = dict(type="VideoAutoencoderPipeline", from_pretrained="embedded:vae")
text_encoder = dict(type="t5", from_pretrained="embedded:text_encoder", model_max_length=32)
scheduler = dict(type="rflow", num_sampling_steps=30, cfg_scale=2.5)

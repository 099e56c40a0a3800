num_frames = 16
fps = 8
image_size = (256, 256)

vae = dict(type="VideoAutoencoderKL", from_pretrained="stabilityai/sd-vae-ft-ema")
scheduler = dict(type="dpm-solver", num_sampling_steps=20, cfg_scale=7.0)

dtype = "bf16"
batch_size = 2
seed = 42
save_dir = "./samples/samples/"

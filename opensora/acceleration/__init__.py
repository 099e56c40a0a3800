"""How a model is made to run on a device: devices and number types, memory plans, quantization, compiling, CUDA graphs,
offloading, step caches. Takes models and schedulers as objects; may import them, `errors` and `files`.
"""

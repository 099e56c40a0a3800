"""The networks: transformers, autoencoders, text encoders. Tensors in, tensors out; imports `errors` alone."""

"""The losses of training, one file for each kind of model. A loss takes a batch and a generator, and nothing else."""

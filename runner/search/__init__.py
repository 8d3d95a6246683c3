"""Search for hyperparameters and architectures: the space, the rungs, the sampler and the stored study."""

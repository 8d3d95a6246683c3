"""The fused kernel that makes a batch from uint8 images: in torch, in numba for the CPU, in Triton for GPUs."""

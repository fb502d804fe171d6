"""Backend `triton`: fastdiff's own Triton kernels on CUDA."""

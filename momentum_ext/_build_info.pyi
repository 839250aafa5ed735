# Written by setup.py when the module is compiled.
TORCH_VERSION: str
CUDA_VERSION: str | None
CUDA_ARCHS: str | None
CXX_FLAGS: str

# Written by setup.py when the module is compiled.
TORCH_VERSION: str
CUDA_VERSION: str | None
COMPILER: str
CXX_FLAGS: str

"""The two custom operators. They run in plain PyTorch for now; compiled CPU and CUDA versions take the same arguments."""
from .reference import deform_conv2d, dynamic_conv2d

__all__ = ["deform_conv2d", "dynamic_conv2d"]

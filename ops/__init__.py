"""The two custom operators, in plain PyTorch for now; compiled CPU and CUDA versions will take the same arguments."""
from .reference import deform_conv2d, dynamic_conv2d

__all__ = ["deform_conv2d", "dynamic_conv2d"]

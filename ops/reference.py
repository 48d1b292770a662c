"""The two operators of MedSeg-R in plain PyTorch: their definition, and what the compiled versions must equal."""
import torch
import torch.nn.functional as F


def dynamic_conv2d(x, weight, gate=None, index=None):
    """One k x k kernel per target, applied to every channel of that target's image (dynamic depthwise convolution).

    y[m, c] = conv(gate[m] * x[index[m], c], weight[m]) with zero padding k // 2.

    x [B,C,H,W] features; weight [M,k,k], k odd; gate [M,H,W] or None (all ones); index int64 [M], the image of each
    target, or None (target m reads image m, so M = B). Returns [M,C,H,W] of x's dtype. As in all of PyTorch,
    "convolution" is cross-correlation.
    """
    check_dynamic(x, weight, gate, index)
    k, dtype = weight.shape[-1], x.dtype
    if index is not None:
        x = x[index]
    if gate is not None:
        x = gate[:, None].to(dtype) * x
    M, C, H, W = x.shape
    if x.numel() == 0:
        return x + 0 * weight.sum().to(dtype)  # nothing, but with gradients (of zero)
    weight = weight[:, None].repeat_interleave(C, 0).to(dtype)  # every channel of every target is a group of its own
    return F.conv2d(x.reshape(1, M * C, H, W), weight, padding=k // 2, groups=M * C).view(M, C, H, W)


def check_dynamic(x, weight, gate, index):
    """ValueError unless the shapes are those of dynamic_conv2d."""
    M, k = weight.shape[0], weight.shape[-1]
    if weight.dim() != 3 or weight.shape[1] != k or k % 2 == 0:
        raise ValueError(f"weight must be [M,k,k] with k odd, not {list(weight.shape)}")
    if x.dim() != 4:
        raise ValueError(f"x must be [B,C,H,W], not {list(x.shape)}")
    targets = len(x) if index is None else len(index)
    if targets != M:
        raise ValueError(f"{M} kernels for {targets} targets")
    if gate is not None and gate.shape != (M, *x.shape[2:]):
        raise ValueError(f"gate must be [{M},{x.shape[2]},{x.shape[3]}], not {list(gate.shape)}")


def deform_conv2d(x, offset, weight):
    """Deformable convolution (Dai et al., 2017) with one k x k kernel per target for all of its channels.

    y[m, c, p] = sum_n weight[m, n] * x[m, c, p + p_n + offset[m, n, p]], bilinear between pixels, zero outside.

    x [M,C,H,W]; offset [M,2kk,H,W] in pixels, channel 2n is dy and 2n+1 dx of tap n (torchvision's order), or
    [M,2kk,1,1] for offsets shared over space; weight [M,k,k], k odd. Returns [M,C,H,W] of x's dtype.
    """
    check_deform(x, offset, weight)
    k, (M, C, H, W) = weight.shape[-1], x.shape
    if x.numel() == 0:
        return x + 0 * (weight.sum() + offset.sum()).to(x.dtype)
    if offset.dtype in (torch.float16, torch.bfloat16):  # these cannot count pixels
        offset = offset.float()
    tap = torch.arange(k * k, device=x.device)
    tap_y = (tap // k - k // 2)[:, None, None] + offset[:, 0::2]  # [M,kk,H|1,W|1]: where each tap reads, from p
    tap_x = (tap % k - k // 2)[:, None, None] + offset[:, 1::2]
    if offset.shape[2:] == (1, 1):
        return dynamic_conv2d(x, dense_kernel(tap_y[..., 0, 0], tap_x[..., 0, 0], weight))
    tap_y = tap_y + torch.arange(H, device=x.device)[:, None]
    tap_x = tap_x + torch.arange(W, device=x.device)
    y = torch.zeros_like(x)
    for n in range(k * k):
        y = y + weight[:, n // k, n % k].view(M, 1, 1, 1) * bilinear(x, tap_y[:, n], tap_x[:, n])
    return y.to(x.dtype)


def check_deform(x, offset, weight):
    """ValueError unless the shapes are those of deform_conv2d."""
    M, k = x.shape[0], weight.shape[-1]
    if x.dim() != 4:
        raise ValueError(f"x must be [M,C,H,W], not {list(x.shape)}")
    if weight.shape != (M, k, k) or k % 2 == 0:
        raise ValueError(f"weight must be [{M},k,k] with k odd, not {list(weight.shape)}")
    H, W = x.shape[2:]
    if offset.shape not in ((M, 2 * k * k, H, W), (M, 2 * k * k, 1, 1)):
        raise ValueError(f"offset must be [{M},{2 * k * k},{H},{W}] or [{M},{2 * k * k},1,1], not {list(offset.shape)}")


def bilinear(x, y, x_):
    """x [M,C,H,W] read at rows y and columns x_ (both [M,H,W], in pixels), zero outside -> [M,C,H,W]."""
    M, C, H, W = x.shape
    y0, x0 = y.floor(), x_.floor()
    out = 0
    for row, wy in ((y0, y0 + 1 - y), (y0 + 1, y - y0)):
        for col, wx in ((x0, x0 + 1 - x_), (x0 + 1, x_ - x0)):
            inside = (row >= 0) & (row < H) & (col >= 0) & (col < W)
            at = (row.clamp(0, H - 1) * W + col.clamp(0, W - 1)).long().view(M, 1, H * W).expand(M, C, H * W)
            out = out + (wy * wx * inside)[:, None] * x.flatten(2).gather(2, at).view(M, C, H, W)
    return out


def dense_kernel(tap_y, tap_x, weight):
    """The ordinary kernel [M,K,K] that equals taps at rows tap_y and columns tap_x (both [M,kk], relative to p).

    A bilinear read at a fixed displacement is four weighted reads of whole pixels, so offsets that are shared over
    space turn deformable convolution into a plain one with a slightly larger kernel (K follows the largest offset).
    """
    reach = int(max(tap_y.detach().abs().max(), tap_x.detach().abs().max()).floor()) + 1
    grid = torch.arange(-reach, reach + 1, device=weight.device)

    def share(t):  # [M,kk] -> [M,kk,K]: how much of a read at t falls on each row (or column) of the kernel
        low = t.detach().floor()[..., None]
        return (grid == low) * (low + 1 - t[..., None]) + (grid == low + 1) * (t[..., None] - low)

    return torch.einsum("mn,mny,mnx->myx", weight.flatten(1).to(tap_y.dtype), share(tap_y), share(tap_x))

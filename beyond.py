"""Beyond the paper: two switches of Config, off in the paper's setting, on in the shipped weights.

    adapter   F_SAM + U-Net(F_SAM): learns on the frozen features what tuning the encoder would, once per image
    align     a map per target, where the image looks as the text says: one dot product of pixels and T_attr

Both start at the identity, as all of MedSeg-R does. Shapes as in medsegr.py: B images, M targets, C channels, H x W.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


def zero(layer):
    """A linear or convolutional layer that starts at zero, weights and bias."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x + two normalised 3 x 3 convolutions of it, which start at zero."""

    def __init__(self, channels):
        super().__init__()
        norm = lambda: nn.GroupNorm(8, channels)
        self.layers = nn.Sequential(norm(), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1),
                                    norm(), nn.ReLU(), zero(nn.Conv2d(channels, channels, 3, padding=1)))

    def forward(self, x):
        return x + self.layers(x)


class FeatureAdapter(nn.Module):
    """F_SAM [B,C,H,W] -> the same shape: F_SAM plus a U-Net of it, whose last layer starts at zero.

    widths: channels on the grid, on half of it, and so on. SAM's positional encoding PE is added, so that it knows
    where in the image it is.
    """

    def __init__(self, widths=(64, 128, 160, 192), channels=256):
        super().__init__()
        self.stem, self.place = nn.Conv2d(channels, widths[0], 1), nn.Conv2d(channels, widths[0], 1, bias=False)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip(widths, widths[1:]))
        self.encode, self.decode = (nn.ModuleList(ResidualBlock(w) for w in ws) for ws in (widths, widths[:-1]))
        self.out = nn.Sequential(nn.GroupNorm(8, widths[0]), nn.ReLU(), zero(nn.Conv2d(widths[0], channels, 1)))

    def forward(self, F_SAM, PE):
        """F_SAM [B,C,H,W], PE [1,C,H,W] -> [B,C,H,W]."""
        x, skips = self.stem(F_SAM) + self.place(PE), []
        for n, block in enumerate(self.encode):
            x = block(self.down[n - 1](x) if n else x)
            skips.append(x)
        for n in reversed(range(len(self.up))):
            x = F.interpolate(self.up[n](x), skips[n].shape[-2:], mode="bilinear", align_corners=False) + skips[n]
            x = self.decode[n](x)
        return F_SAM + self.out(x)


class DenseAlignment(nn.Module):
    """Pixels and structures in one space of `channels` dimensions: a structure is where their dot product is positive.

    In training every structure of an image is compared with every pixel at the cost of one (losses.dense_loss). The map
    of a target then enters SAM's decoder twice, each time through a layer that starts at zero: into the features that
    it reads, and beside the upscaled features that its mask is read from.
    """

    def __init__(self, width, channels=128, features=256):
        super().__init__()
        self.pixels = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, channels))
        self.structure = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels + 1))
        nn.init.constant_(self.structure[1].bias[-1:], -3.0)  # most of an image is not what is asked for
        self.to_features, self.to_mask = zero(nn.Conv2d(1, features, 1)), zero(nn.Linear(features, 1))

    def forward(self, pixels, T_attr):
        """Pixels [B,H,W,D] of `self.pixels`, T_attr [K,d] -> logits of every structure in every image, [B,K,H,W]."""
        return self.compare("bhwd,kd->bkhw", pixels, T_attr)

    def of_targets(self, pixels, image_index, T_attr):
        """The logits of M targets, [M,H,W]: T_attr [M,d], and image_index [M] says in which image."""
        return self.compare("mhwd,md->mhw", pixels[image_index], T_attr)

    def on_features(self, text_map):
        """Maps of M targets [M,H,W] -> what they add to the features, [M,C,H,W], in memory a vector per pixel."""
        weight, bias = self.to_features.weight.flatten(1), self.to_features.bias
        return F.linear(text_map[..., None], weight, bias).permute(0, 3, 1, 2)

    def compare(self, products, pixels, T_attr):
        w, bias = self.structure(T_attr).split([pixels.shape[-1], 1], 1)
        x = torch.einsum(products, pixels, w.to(pixels.dtype))
        return x.float() / pixels.shape[-1] ** 0.5 + bias[..., None]

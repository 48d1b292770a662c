"""MedSeg-R: Medical Image Segmentation with Clinical Reasoning (Shao and Hou). The whole model, read top to bottom:

    text -> priors -> modulated SAM features -> masks

    model = MedSegR(Config())                                            # or Config(**LIGHT): needs no download
    features = model.encode_image(images)                                # [B,256,H,W]: frozen, cacheable
    priors = model.encode_attributes([{"position": "...", "texture": "...", "shape": "..."}] * M)
    logits, iou = model.decode(features, image_index, priors, boxes=boxes)  # [M,h,w] and [M]

An image with eight organs is encoded once and asked eight times: a *target* is an image and one structure to find in
it. Shapes: B images, M targets, C = 256 channels, H x W SAM's feature grid, S the image size in pixels, d the width of
the text encoder, L its context length in tokens. Equation and table numbers are the paper's.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from beyond import DenseAlignment, FeatureAdapter, zero
from common import ATTRIBUTES, InputError, seeded
from encoders import TextEncoder, build_sam, features_key, tiny_vit, tune, upscaling
from ops import deform_conv2d, dynamic_conv2d

BRANCHES = ("fused", "sem", "sam")  # F_fused, F_sem and F_SAM of table 6
BACKBONES = ("lite_medsam", "vit_b", "vit_l", "vit_h", "sam_med2d")


@dataclass
class Config:
    """All that defines a model. The switches are the rows of tables 3-6; a part switched off has no parameters."""
    backbone: str = "vit_b"
    sam_checkpoint: str | None = None   # SAM's or MedSAM's file; None: the backbone's own; "random": seeded weights
    clip: str = "ViT-B-16-quickgelu:openai"  # NAME[:TAG or FILE] of open_clip, see TextEncoder
    image_size: int | None = None       # S; None: 256 for lite_medsam and sam_med2d, the paper's 224 for ViT
    normalize: str | None = None        # "sam" (mean and std) or "minmax" (MedSAM); None: the backbone's own
    feature_grid: int | None = None     # pool the features to H = W = this, to train on a CPU; None: the backbone's own
    attributes: tuple = ATTRIBUTES      # table 3: the texts that the cognitive stage sees
    priors: tuple = ATTRIBUTES          # table 4: the perceptual heads that act
    cognitive: bool = True              # table 5
    perceptual: bool = True             # table 5
    caa: bool = True                    # table 5: cross-attribute attention
    branches: tuple = BRANCHES          # table 6: what the gate sees
    sentence: bool = False              # a baseline: the three texts as one sentence, whose mean is T_attr; no heads
    position_grid: int = 14             # g: the position map is predicted on g x g
    offset_grid: int = 1                # n: the shape offsets are predicted on n x n; 1: shared over space
    heads: int = 8                      # of the channel attention
    adapter: bool = False               # beyond the paper: a U-Net on the frozen features, see beyond.py
    align: bool = False                 # beyond the paper: a map per target from pixels and T_attr, see beyond.py
    tune_encoder: str = "none"          # beyond the paper: "lora" or "all" trains the image encoder as well
    lora_rank: int = 4                  # SAMed's

    def __post_init__(self):
        if self.backbone not in BACKBONES:
            raise InputError(f"--backbone {self.backbone}: not one of {', '.join(BACKBONES)}")
        for name, known in (("attributes", ATTRIBUTES), ("priors", ATTRIBUTES), ("branches", BRANCHES)):
            unknown = set(getattr(self, name)) - set(known)
            if unknown:
                raise InputError(f"--{name} {' '.join(sorted(unknown))}: choose from {' '.join(known)}")
            setattr(self, name, tuple(x for x in known if x in getattr(self, name)))  # in order, each once
        if self.sentence:  # the single global sentence embedding that the paper ascribes to SEG-SAM
            self.attributes, self.perceptual, self.caa = ATTRIBUTES, False, False
        lite = self.backbone == "lite_medsam"
        self.image_size = self.image_size or (224 if self.backbone.startswith("vit") else 256)
        self.normalize = self.normalize or ("minmax" if lite else "sam")
        if self.normalize not in ("sam", "minmax"):
            raise InputError(f"--normalize {self.normalize}: choose sam or minmax")
        multiple = 32 if self.backbone == "sam_med2d" else self.stride  # its adapters halve the grid
        if self.image_size % multiple or self.image_size < 2 * self.stride:
            raise InputError(f"--image-size {self.image_size}: must be a multiple of {multiple} for {self.backbone}")
        own_grid = self.image_size // self.stride
        self.feature_grid = self.feature_grid or own_grid
        if not 2 <= self.feature_grid <= own_grid:
            raise InputError(f"--feature-grid {self.feature_grid}: give 2 to {own_grid}, the backbone's own grid")
        if self.position_grid < 1 or self.offset_grid < 1:
            raise InputError("--position-grid and --offset-grid must be at least 1")
        if self.heads < 1 or 256 % self.heads:
            raise InputError(f"--heads {self.heads}: must divide the 256 channels")
        if self.tune_encoder not in ("none", "lora", "all"):
            raise InputError(f"--tune-encoder {self.tune_encoder}: choose none, lora or all")
        if self.lora_rank < 1:
            raise InputError(f"--lora-rank {self.lora_rank}: give at least 1")
        if self.align and "sem" not in self.active_branches:
            raise InputError("--align: compares pixels with T_attr, which is switched off; leave it out")
        if not self.active_branches:
            raise InputError(f"--branches {' '.join(self.branches)}: every one of them is switched off; add sam")

    @property
    def stride(self):
        """Image pixels per feature cell; a LiteMedSAM cell is 4 pixels, a ViT cell 16."""
        return 4 if self.backbone == "lite_medsam" else 16

    @property
    def active_branches(self):
        """The branches that differ from F_SAM or are F_SAM: without any head F_fused is F_SAM, so it has no branch."""
        on = {"fused": self.perceptual and self.priors, "sem": self.cognitive and self.attributes, "sam": True}
        return tuple(b for b in self.branches if on[b])

    @property
    def active_priors(self):
        """The heads that reach the decoder, through F_fused or through F_sem, which is made of it."""
        reach = {"fused", "sem"} & set(self.active_branches)
        return self.priors if self.perceptual and reach else ()


# ---------------------------------------------------------------------------------------------------------------------
# Cognitive stage

class CognitiveStage(nn.Module):
    """Equations 2 and 3: the tokens of the attributes attend to each other (CAA), their mean is T_attr."""

    def __init__(self, width, attributes, caa):
        super().__init__()
        self.columns = [ATTRIBUTES.index(a) for a in attributes]
        self.caa = caa
        if caa:
            self.which = nn.Parameter(0.02 * torch.randn(len(attributes), 1, width))  # tells the attributes apart
            self.block = nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, dropout=0.0,
                                                    activation="gelu", batch_first=True, norm_first=True)

    def forward(self, T, valid):
        """T [M,3,L,d], valid [M,3,L] -> T_attr [M,d], the mean over the tokens that are text."""
        T, valid = T[:, self.columns], valid[:, self.columns].flatten(1)
        T_cross = T.flatten(1, 2)
        if self.caa:
            T_cross = self.block((T + self.which).flatten(1, 2), src_key_padding_mask=~valid)
        return (T_cross * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)


class ChannelCrossAttention(nn.Module):
    """Equation 4: F_sem = MHCA_C(F_fused, F_attr, F_attr), attention between channels as in CamoFormer.

    The paper does not define F_attr. A vector repeated over space would lose all but its signs in the normalisation
    along space, so T_attr modulates what varies over space: SAM's positional encoding PE and the image itself,
    F_attr = scale(T_attr) * PE + shift(T_attr) + film(T_attr) * norm(F_fused).
    """

    def __init__(self, width, heads, channels=256):
        super().__init__()
        self.heads = heads
        self.norm_text, self.norm = nn.LayerNorm(width), nn.LayerNorm(channels)
        self.scale, self.shift, self.film = (nn.Linear(width, channels) for _ in range(3))
        self.q, self.k, self.v = (nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)) for _ in range(3))
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, F_fused, T_attr, PE):
        """F_fused [M,C,H,W], T_attr [M,d], PE [1,C,H,W] -> F_sem [M,C,H,W]."""
        scale, shift, film = (f(self.norm_text(T_attr))[:, None, None] for f in (self.scale, self.shift, self.film))
        F_fused, PE = F_fused.permute(0, 2, 3, 1), PE.permute(0, 2, 3, 1).to(shift.dtype)
        normed = self.norm(F_fused)
        F_attr = torch.addcmul(torch.addcmul(shift, scale, PE), film, normed)
        q, k, v = (self.project(*pair) for pair in ((self.q, normed), (self.k, F_attr), (self.v, F_attr)))
        # [M,C,C]: the heads are blocks of it, and one product of all with all is faster than a copy of each head
        attention = q.transpose(1, 2) @ (k / length(k)) / length(q).transpose(1, 2)
        head = torch.arange(self.heads, device=q.device).repeat_interleave(q.shape[-1] // self.heads)
        attention = (attention * self.temperature[head, 0]).masked_fill(head[:, None] != head, -torch.inf).softmax(-1)
        # self.out(v attention^T): the two small matrices are multiplied first
        mixed = self.out.weight.flatten(1) @ attention.to(v.dtype)
        refined = torch.baddbmm(self.out.bias, v, mixed.transpose(1, 2))
        return (F_fused + refined.view(F_fused.shape)).permute(0, 3, 1, 2)

    def project(self, convolutions, x):
        """x [M,H,W,C] -> [M,HW,C]. The 1 x 1 convolution as a product: of one image alone a convolution takes the
        memory to be planes, and copies it."""
        mix, depthwise = convolutions
        x = F.linear(x, mix.weight.flatten(1)).permute(0, 3, 1, 2)
        return depthwise(x).permute(0, 2, 3, 1).flatten(1, 2)


def length(x):
    """[M,HW,C] -> that of each channel over HW, [M,1,C]; never 0. On a CPU ten times as fast as torch's norm."""
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(1, keepdim=True)
    return squares.clamp(min=max(1e-24, torch.finfo(x.dtype).tiny)).sqrt().to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Perceptual stage

class Priors(NamedTuple):
    """What the texts of M targets do to the image features; None where a part is switched off."""
    A_pos: torch.Tensor | None         # [M,g,g] in (0, 2): 1 leaves the features as they are
    texture: torch.Tensor | None       # [M,7,7]
    shape_kernel: torch.Tensor | None  # [M,3,3]
    shape_offset: torch.Tensor | None  # [M,18,n,n] in feature cells, dy and dx of each tap; None: a dense shape_kernel
    T_attr: torch.Tensor | None        # [M,d]

    def take(self, index):
        """The priors of some targets: a slice or an int64 tensor."""
        return Priors(*(None if p is None else p[index] for p in self))


class Head(nn.Module):
    """Flattened tokens -> one linear layer -> the numbers of an operator; zero for every text at the start.

    The input is scaled to length one and the output by `scale`: Adam moves each of the L*d weights by about lr, so
    that an unscaled head would jump by lr * L*d in its first step.
    """

    def __init__(self, tokens, outputs, scale=1.0):
        super().__init__()
        self.linear, self.scale = zero(nn.Linear(tokens, outputs)), scale

    def forward(self, T_a):
        """T_a [M,L,d] -> [M,outputs]."""
        return self.scale * self.linear(F.normalize(T_a.flatten(1), dim=1))


class PerceptualStage(nn.Module):
    """The position, texture and shape heads; each starts as the identity of its operator."""

    def __init__(self, tokens, priors, position_grid, offset_grid):
        super().__init__()
        self.g, self.n = position_grid, offset_grid
        self.position = Head(tokens, self.g ** 2) if "position" in priors else None
        self.texture = Head(tokens, 7 * 7, scale=1 / 49) if "texture" in priors else None
        self.shape_kernel = Head(tokens, 3 * 3, scale=1 / 9) if "shape" in priors else None
        self.shape_offset = Head(tokens, 18 * self.n ** 2) if "shape" in priors else None

    def forward(self, T):
        """T [M,3,L,d] -> A_pos, texture, shape_kernel, shape_offset of Priors."""
        T_pos, T_tex, T_shape = T.unbind(1)
        return (2 * self.position(T_pos).sigmoid().unflatten(1, (self.g, self.g)) if self.position else None,
                delta(7, T) + self.texture(T_tex).unflatten(1, (7, 7)) if self.texture else None,
                delta(3, T) + self.shape_kernel(T_shape).unflatten(1, (3, 3)) if self.shape_kernel else None,
                self.shape_offset(T_shape).unflatten(1, (18, self.n, self.n)) if self.shape_offset else None)


def delta(k, like):
    """The k x k kernel of the identity."""
    kernel = like.new_zeros(k, k)
    kernel[k // 2, k // 2] = 1
    return kernel


def modulate(F_SAM, index, priors):
    """F_SAM [B,C,H,W], index [M], priors of M targets -> F_fused [M,C,H,W]: where, of what texture, in what shape."""
    size, A_pos, offset = F_SAM.shape[-2:], priors.A_pos, priors.shape_offset
    if A_pos is not None:
        A_pos = F.interpolate(A_pos[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    if priors.texture is not None:
        x = dynamic_conv2d(F_SAM, priors.texture, A_pos, index)  # F_attn = A_pos * F_SAM, then F'
    else:
        x = F_SAM[index] if A_pos is None else A_pos[:, None] * F_SAM[index]
    if priors.shape_kernel is not None and offset is None:
        x = dynamic_conv2d(x, priors.shape_kernel)
    elif priors.shape_kernel is not None:
        if offset.shape[-1] > 1:
            offset = F.interpolate(offset, size, mode="bilinear", align_corners=False)
        x = deform_conv2d(x, offset, priors.shape_kernel)
    return x


class Gate(nn.Module):
    """Table 6: one weight per pixel and branch, softmax over the branches; starts as their mean."""

    def __init__(self, branches, channels=256):
        super().__init__()
        self.conv = zero(nn.Conv2d(branches * channels, branches, 1))

    def forward(self, branches):
        """n tensors [M,C,H,W] -> their weighted sum [M,C,H,W], the weights [M,n,H,W]."""
        pixels = [b.permute(0, 2, 3, 1) for b in branches]
        parts = self.conv.weight.flatten(1).split(pixels[0].shape[-1], 1)
        scores = F.linear(pixels[0], parts[0], self.conv.bias) + sum(map(F.linear, pixels[1:], parts[1:]))
        weights = scores.softmax(-1).to(pixels[0].dtype)  # [M,H,W,n]
        total = weights[..., :1] * pixels[0]
        for n, x in enumerate(pixels[1:], 1):
            total = torch.addcmul(total, weights[..., n, None], x)
        return total.permute(0, 3, 1, 2), weights.permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The model

class MedSegR(nn.Module):
    """SAM with its features steered by three texts. Untrained, it gives the masks of the SAM that it was built on."""

    def __init__(self, config=None):
        super().__init__()
        self.config = c = config or Config()
        self.sam, self.sam_hash = build_sam(c)
        PE = self.sam.prompt_encoder.get_dense_pe()  # SAM's positional encoding of the grid, [1,C,H,W]
        self.register_buffer("PE", PE.clone(memory_format=torch.channels_last), persistent=False)
        self.clip = self.perceptual = self.cognitive = self.refine = self.gate = self.align = None
        tune(self.sam.image_encoder, c.tune_encoder, c.lora_rank)
        if c.active_priors or "sem" in c.active_branches:
            self.clip = TextEncoder(c.clip)
            L, d = self.clip.context, self.clip.width
        if c.active_priors:
            self.perceptual = PerceptualStage(L * d, c.active_priors, c.position_grid, c.offset_grid)
        if "sem" in c.active_branches:
            self.cognitive = CognitiveStage(d, c.attributes[:1] if c.sentence else c.attributes, c.caa)
            self.refine = ChannelCrossAttention(d, c.heads)
            self.align = DenseAlignment(d) if c.align else None
        self.adapter = FeatureAdapter() if c.adapter else None
        if len(c.active_branches) > 1:
            self.gate = Gate(len(c.active_branches))
        # the decoder is trained, but for the hypernetworks of SAM's three alternative masks, which are never asked for
        self.sam.mask_decoder.requires_grad_(True)
        self.sam.mask_decoder.output_hypernetworks_mlps[1:].requires_grad_(False)

    @property
    def device(self):
        return self.sam.prompt_encoder.no_mask_embed.weight.device

    def trained(self):
        """{name: parameter} of all that is trained: what an optimiser is given and what a checkpoint holds."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def train(self, mode=True):
        """As nn.Module.train, but the frozen encoders stay in evaluation mode: MiniLM, say, has dropout."""
        super().train(mode)
        for frozen in (self.sam.image_encoder, self.sam.prompt_encoder, self.clip):
            if frozen is not None:
                frozen.eval()
        return self

    def describe(self):
        """One line: backbone, text encoder, parameters."""
        trained = sum(p.numel() for p in self.trained().values()) / 1e6
        frozen = sum(p.numel() for p in self.parameters()) / 1e6 - trained
        text = self.clip.description if self.clip is not None else "none, every text is switched off"
        weights = "seeded random weights, NOT pretrained" if self.config.sam_checkpoint == "random" else "pretrained"
        return (f"backbone {self.config.backbone} ({weights}) at {self.config.image_size} px, text encoder {text}, "
                f"{trained:.2f} M parameters trained, {frozen:.2f} M frozen")

    def encode_image(self, images):
        """Images [B,3,S,S], RGB, 0 to 255 (uint8 or float) -> features F_SAM [B,256,H,W]. Frozen, so cacheable, unless
        tune_encoder says otherwise."""
        S = self.config.image_size
        if images.shape[1:] != (3, S, S):
            raise InputError(f"images must be [B,3,{S},{S}], not {list(images.shape)}")
        x = images.to(self.device, torch.float32)
        if self.config.backbone == "sam_med2d":
            x = x.flip(1)  # it was trained on BGR images with the statistics of RGB
        if self.config.normalize == "sam":
            mean, std = x.new_tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[..., None, None]
            x = (x - mean) / std
        else:
            low, high = x.amin((1, 2, 3), True), x.amax((1, 2, 3), True)
            x = (x - low) / (high - low).clamp(min=1e-8)
        encoder, grid = self.sam.image_encoder, self.config.feature_grid
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.tune_encoder != "none"):
            features = tiny_vit(encoder, x) if self.config.backbone == "lite_medsam" else encoder(x)
            return features if features.shape[-1] == grid else F.adaptive_avg_pool2d(features, grid)

    def features_key(self):
        """A hash of all that `encode_image` depends on, see encoders.features_key."""
        return features_key(self)

    def text_tokens(self, texts, empty=False, drop=None):
        """M dicts with the texts "position", "texture" and "shape" -> T_a of their N distinct triples (equation 1):
        frozen tokens [N,3,L,d], valid bool [N,3,L]; how long the longest text is, in tokens; and which triple each of
        the M is, int64 [M]. An empty text is an error, unless `empty` allows it: then the text encoder sees its start
        and end tokens alone. drop: (share, seed): for training, so many tokens of each text are left out, of
        equal triples the same ones."""
        for m, text in enumerate(texts):
            for a in ATTRIBUTES:
                if not empty and not str(text.get(a) or "").strip():
                    raise InputError(f"target {m}: its {a} text is empty; write a sentence about the structure's {a}, "
                                     "or train without that attribute")
        triples = [tuple(text[a] for a in ATTRIBUTES) for text in texts] or [("-",) * 3]  # a dummy for M = 0
        if self.config.sentence:
            triples = [("; ".join(filter(None, triple)),) for triple in triples]
        row = {triple: i for i, triple in enumerate(dict.fromkeys(triples))}
        encoded = {t: self.clip.tokens(t) for triple in row for t in triple}
        lengths = torch.tensor([[len(encoded[t]) for t in triple] for triple in row], device=self.device)
        L = self.clip.context
        padded = {t: F.pad(tokens, (0, 0, 0, L - len(tokens))) for t, tokens in encoded.items()}
        T = torch.stack([torch.stack([padded[t] for t in triple]) for triple in row])
        valid = torch.arange(L, device=self.device) < lengths[..., None]
        if drop:
            share, seed = drop
            kept = torch.stack([torch.from_numpy(seeded("dropped", seed, ascii(triple)).random(valid.shape[1:]))
                                for triple in row]) >= share
            kept[..., 0] = True  # the start token: no text becomes empty
            valid = valid & kept.to(self.device)
            T = T * valid[..., None]
        index = torch.tensor([row[t] for t in triples[:len(texts)]], dtype=torch.int64, device=self.device)
        return T, valid, int(lengths.max()), index

    def encode_attributes(self, texts, empty=False, drop=None):
        """M dicts of texts -> the Priors of M targets, see `text_tokens`. Equal triples are computed once."""
        if self.clip is None:
            return Priors(None, None, None, None, None)
        T, valid, L, index = self.text_tokens(texts, empty, drop)
        heads = self.perceptual(T) if self.perceptual else (None,) * 4
        T_attr = self.cognitive(T[:, :, :L], valid[:, :, :L]) if self.cognitive else None
        return Priors(*heads, T_attr).take(index)

    def semantic_prior(self, texts, drop=None):
        """K dicts of texts -> T_attr [K,d] alone."""
        T, valid, L, index = self.text_tokens(texts, drop=drop)
        return self.cognitive(T[:, :, :L], valid[:, :, :L])[index]

    def decode(self, features, image_index, priors, points=None, boxes=None, masks=None, explain=False):
        """Features [B,C,H,W], image_index int64 [M], Priors of M targets -> mask logits [M,4H,4W], predicted IoU [M].

        points: (coordinates float [M,N,2], labels int [M,N]), (x, y) in pixels of the S x S image, label 1 inside, 0
        outside, -1 padding; boxes: float [M,4], x0 y0 x1 y1; masks: float [M,4H,4W], the logits of an earlier answer;
        all None: no prompt. With explain=True also a dict of what the steps did: F_fused and F_sem [M,C,H,W], gate
        [M,branches,H,W], text_map [M,H,W] of DenseAlignment; None for what is switched off.
        """
        features, pixels = self.adapt_features(features)
        x, steps = self.modulate_features(features, pixels, image_index, priors)
        out = self.decode_masks(x, steps["text_map"], points, boxes, masks)
        return (*out, steps) if explain else out

    def adapt_features(self, features):
        """Beyond the paper, once per image: features [B,C,H,W] -> those of the adapter, and the pixels [B,H,W,D] that
        DenseAlignment compares with texts. Without these switches the features as they are, and None."""
        if torch.is_autocast_enabled(features.device.type):  # half the bytes to move, and the CPU's time is moving them
            features = features.to(torch.get_autocast_dtype(features.device.type))
        features = features.contiguous(memory_format=torch.channels_last)  # what CPUs and tensor cores convolve fastest
        features = self.adapter(features, self.PE) if self.adapter else features
        return features, self.align.pixels(features.permute(0, 2, 3, 1)) if self.align else None

    def modulate_features(self, features, pixels, image_index, priors):
        """The text's part of decode -> the features that SAM's decoder sees, [M,C,H,W], and the dict of `explain`."""
        F_SAM = features.permute(0, 2, 3, 1)[image_index].permute(0, 3, 1, 2)  # so that its gradient keeps the layout
        F_fused = modulate(features, image_index, priors) if self.perceptual else F_SAM
        F_fused = F_fused.contiguous(memory_format=torch.channels_last)  # sums of two layouts take far longer
        F_sem = self.refine(F_fused, priors.T_attr, self.PE) if self.refine else None
        branches = [dict(fused=F_fused, sem=F_sem, sam=F_SAM)[b] for b in self.config.active_branches]
        x, weights = self.gate(branches) if self.gate else (branches[0], None)
        text_map = self.align.of_targets(pixels, image_index, priors.T_attr) if self.align else None
        if self.align:
            x = x + self.align.on_features(text_map)
        return x, dict(F_fused=F_fused, F_sem=F_sem, gate=weights, text_map=text_map)

    def decode_masks(self, x, text_map=None, points=None, boxes=None, masks=None):
        """SAM's part of decode: its prompt encoder and mask decoder with an image embedding per target, [M,C,H,W];
        SAM's own forward would pair every image with every prompt. Only the first mask, SAM's answer to
        multimask_output=False, is computed. text_map [M,H,W]: of DenseAlignment."""
        decoder, M = self.sam.mask_decoder, len(x)
        if masks is not None:
            masks = masks[:, None]
        sparse, dense = self.sam.prompt_encoder(points=points, boxes=boxes, masks=masks)
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([tokens.expand(M, -1, -1), sparse.expand(M, -1, -1)], dim=1)
        x, dense, PE = (t.to(x.dtype).contiguous(memory_format=torch.channels_last)  # a vector per pixel
                        for t in (x, dense, self.PE))
        hs, src = decoder.transformer(x + dense, PE.expand(M, -1, -1, -1), tokens)
        up = upscaling(decoder.output_upscaling, src)  # [M,h*w,16,C/8]
        kernel = decoder.output_hypernetworks_mlps[0](hs[:, 1])
        masks = (up.flatten(1, 2) @ kernel[..., None]).view(M, *x.shape[-2:], 2, 2, 2, 2)
        masks = masks.permute(0, 1, 3, 5, 2, 4, 6).reshape(M, *(4 * n for n in x.shape[-2:]))  # parts in their places
        if text_map is not None:
            text_map = F.interpolate(text_map[:, None], masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
            masks = masks + self.align.to_mask(hs[:, 1])[..., None] * text_map
        return masks, decoder.iou_prediction_head(hs[:, 0])[:, 0]

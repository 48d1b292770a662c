"""The feature cache: never stale, never half-written, bounded."""
import os
import time

import numpy as np
import torch

from cache import FeatureCache, fill
from medsegr import Config, MedSegR


class Encoder:
    """Stands for a model: counts the images that it encodes."""

    def __init__(self):
        self.calls = 0

    def __call__(self, images):
        self.calls += len(images)
        return images.float().mean(1, keepdim=True)


def pictures(n, seed=0):
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_second_time_is_read(tmp_path):
    encode, images = Encoder(), pictures(5)
    first = FeatureCache(tmp_path, "key")(images, encode)
    again = FeatureCache(tmp_path, "key")(images.flip(0), encode).flip(0)
    assert encode.calls == 5 and torch.equal(first, again)
    torch.testing.assert_close(first, encode(images), rtol=1e-3, atol=0.1)
    assert torch.equal(first, FeatureCache(None, "key")(images, encode))  # the same without a cache


def test_other_pixels_or_key_are_encoded_anew(tmp_path):
    encode, images = Encoder(), pictures(1)
    FeatureCache(tmp_path, "key")(images, encode)
    images[0, 2, 7, 7] += 1
    assert torch.equal(FeatureCache(tmp_path, "key")(images, encode), encode(images).half().float())
    FeatureCache(tmp_path, "other")(images, encode)
    assert encode.calls == 4


def test_damaged_entry_is_encoded_anew(tmp_path):
    encode, images = Encoder(), pictures(3)
    cache = FeatureCache(tmp_path, "key")
    expected = cache(images, encode)
    files = sorted(tmp_path.glob("*/*.npy"))
    files[0].write_bytes(files[0].read_bytes()[:50])
    files[1].write_bytes(b"")
    files[2].write_bytes(np.random.default_rng(0).bytes(200))
    assert torch.equal(FeatureCache(tmp_path, "key")(images, encode), expected)
    assert encode.calls == 6


def test_size_limit(tmp_path):
    encode, size = Encoder(), 16 * 16 * 2 + 128
    limit = 10.5 * size / 1e9
    size_now = lambda: sum(f.stat().st_size for f in tmp_path.glob("*/*.npy"))
    cache = FeatureCache(tmp_path, "old", limit)
    cache(pictures(30), encode)
    assert 0 < size_now() <= limit * 1e9
    for f in tmp_path.glob("*/*.npy"):
        os.utime(f, (time.time() - 1000,) * 2)
    new = FeatureCache(tmp_path, "new", limit)
    new(pictures(8, 1), encode)
    assert size_now() <= limit * 1e9 and len(list(tmp_path.glob("new/*.npy"))) == 8  # old ones made room
    new(pictures(20, 2), encode)
    calls = encode.calls
    new(pictures(8, 1), encode)
    assert encode.calls == calls, "what this run has used must stay"


def test_fill_leaves_nothing_to_encode(tmp_path):
    images = pictures(7).permute(0, 2, 3, 1).numpy()
    sample = lambda i: type("Sample", (), dict(image=images[i]))
    encode, cache = Encoder(), FeatureCache(tmp_path, "key")
    for rank in range(2):
        fill(cache, 7, sample, encode, rank, 2)
    assert encode.calls == 7
    cache(torch.from_numpy(images).permute(0, 3, 1, 2), encode)
    fill(cache, 7, sample, encode)
    assert encode.calls == 7


def test_key_knows_what_the_features_depend_on():
    keys = [MedSegR(Config(branches=("sam",), **c)).features_key() for c in (
        dict(image_size=64), dict(image_size=96), dict(image_size=64, normalize="sam"),
        dict(image_size=64, feature_grid=8), dict(image_size=64, sam_checkpoint="random"))]
    assert len(set(keys)) == len(keys)
    assert keys[0] == MedSegR(Config(image_size=64, priors=("texture",))).features_key()

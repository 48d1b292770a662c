"""Frozen image features on disk, so that an image is encoded once and then only read.

One .npy file (float16, never pickled) per image, named by a hash of the image's own pixels, in a folder named by a hash
of everything the encoder depends on: a stale entry cannot be found. Files appear by renaming, so that a kill leaves no
half-written one and several processes can share a folder.
"""
import hashlib
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


class FeatureCache:
    """folder: None keeps nothing. key: MedSegR.features_key() and the precision. limit_gb: of the whole folder.

    When it is full, features that this process has not used make room, oldest first; then new ones are not kept.
    """

    def __init__(self, folder, key, limit_gb=20.0):
        self.root = None if folder is None or limit_gb <= 0 else Path(folder)
        self.limit, self.start, self.total = int(limit_gb * 1e9), time.time(), 0
        if self.root:
            self.folder = self.root / key
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.root.glob("*/*.part"):  # left by a kill
                if self.start - part.stat().st_mtime > 600:
                    part.unlink(missing_ok=True)
            self.total = sum(f.stat().st_size for f in self.root.glob("*/*.npy"))

    def path(self, image):
        """image uint8 [3,S,S] -> the file of its features."""
        pixels = np.ascontiguousarray(image)
        return self.folder / (hashlib.blake2b(pixels, digest_size=16).hexdigest() + ".npy")

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

    def read(self, image):
        if not self.root:
            return None
        path = self.path(image)
        try:
            if path.stat().st_mtime < self.start:
                os.utime(path)  # used by this process, so it stays
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):  # not there, or damaged: encode again
            return None

    def write(self, image, features):
        if not self.root or not self.make_room(features.nbytes + 128):
            return
        path = self.path(image)
        part = path.with_name(f"{path.stem}.{os.getpid()}.part")
        try:
            with open(part, "wb") as f:
                np.save(f, features)
            os.replace(part, path)
            self.total += path.stat().st_size
        except OSError as e:  # a full disk costs time, not the run
            part.unlink(missing_ok=True)
            print(f"cache {self.root}: {e.strerror}; going on without keeping more features")
            self.limit = 0

    def make_room(self, size):
        """Deletes unused files until `size` bytes fit -> whether they do."""
        if self.total + size <= self.limit:
            return True
        files = sorted((f.stat().st_mtime, f) for f in self.root.glob("*/*.npy")) if self.limit else []
        self.total = sum(f.stat().st_size for _, f in files)
        for used, file in files:
            if self.total + size <= 0.9 * self.limit or used >= self.start:
                break
            self.total -= file.stat().st_size
            file.unlink(missing_ok=True)
        if self.total + size > self.limit:
            self.limit = 0  # everything here is in use
        return self.total + size <= self.limit


def fill(cache, count, sample, encode, rank=0, world=1, note="encoding images"):
    """Encodes this process's share of the images sample(0), ..., sample(count - 1) into the cache; a progress bar."""
    if cache.root is None:
        return
    for i in tqdm(range(rank, count, world), note, disable=rank > 0, unit="image", mininterval=1):
        image = torch.from_numpy(sample(i).image).permute(2, 0, 1)[None].contiguous()
        if not cache.path(image[0]).is_file():
            cache(image, encode)

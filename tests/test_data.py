"""data.py: samples on the model's grid, variations, prompts, texts and batches."""
import json
import re
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch

import common
import data
from conftest import ROOT, fails
from batches import add_prompts, make_batch
from data import (ATTRIBUTES, Texts, box_prompt, make_sample, open_dataset, point_prompt, prompt_rng, to_original,
                  vary)
from readers import ORGANS, Picture
from sa_med2d import SAMed2D

KNOWN = Texts("synapse")
SAMPLES = [open_dataset("demo", image_size=64)[i] for i in range(4)]


@pytest.mark.parametrize("body, status, words", [
    ("raise common.InputError('--x: bad\\nvalue; give a good one')", 2, "t.py: --x: bad value; give a good one"),
    ("raise OSError('disk')", 2, "t.py: disk"),
    ("raise KeyboardInterrupt", 130, "t.py: interrupted"),
    ("common.Parser().parse_args(['--nothere'])", 2, "t.py: unrecognized arguments: --nothere; --help lists the flags"),
    ("data.open_dataset('synapse', 'missing')", 2, "t.py: missing: no such folder"),
])
def test_run(tmp_path, monkeypatch, capsys, body, status, words):
    def main():
        exec(body, {"common": common, "data": data})

    monkeypatch.setattr(sys, "argv", ["folder/t.py"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        common.run(main, OSError)
    out, err = capsys.readouterr()
    assert e.value.code == status and out == "" and err.startswith(words) and err.count("\n") == 1


# --- samples

def test_to_original():
    rng = np.random.default_rng(0)
    for _ in range(10):
        t, h, w = rng.integers(1, 9), *rng.integers(8, 90, 2)
        flat = to_original(torch.full((int(t), 32, 32), 0.5), (h, w))
        assert flat.shape == (t, h, w) and torch.allclose(flat, torch.tensor(0.5))
    x = torch.randn(2, 24, 24)
    assert torch.allclose(to_original(x, (24, 24)), x, atol=1e-6)
    assert to_original(x[:0], (5, 7)).shape == (0, 5, 7)
    half = torch.zeros(1, 32, 32)
    half[..., 16:] = 1  # the right half stays the right half
    assert (to_original(half, (40, 80))[0] > 0.5).sum(1).eq(40).all()


# --- prompts

def random_mask(rng):
    """A filled rectangle with some pixels knocked out, on a grid whose sides differ."""
    h, w = rng.integers(1, 60, 2)
    mask = np.zeros((h, w), bool)
    y, x = sorted(rng.integers(0, h, 2)), sorted(rng.integers(0, w, 2))
    mask[y[0]:y[1] + 1, x[0]:x[1] + 1] = True
    mask &= rng.random((h, w)) < 0.9
    mask[y[0], x[0]] = True
    return mask


def test_boxes():
    rng = np.random.default_rng(0)
    for _ in range(300):
        mask = random_mask(rng)
        ys, xs = np.nonzero(mask)
        box = box_prompt(mask)
        assert box.dtype == np.float32 and box.tolist() == [xs.min(), ys.min(), xs.max(), ys.max()]
        noisy = box_prompt(mask, rng)
        most = min(5, (box[2:] - box[:2]).min() / 2)
        assert abs(noisy - box).max() <= most and np.array_equal(noisy, np.round(noisy))
        assert 0 <= noisy[0] <= noisy[2] < mask.shape[1] and 0 <= noisy[1] <= noisy[3] < mask.shape[0]
    mask = np.zeros((100, 100), bool)
    mask[40:60, 30:70] = True
    shifts = np.array([box_prompt(mask, rng) - box_prompt(mask) for _ in range(400)])
    assert set(np.unique(shifts)) == set(range(-5, 6)) and abs(shifts.mean()) < 0.5
    with pytest.raises(ValueError):
        box_prompt(np.zeros((5, 5), bool))


def test_points():
    rng = np.random.default_rng(0)
    for _ in range(300):
        mask, n = random_mask(rng), int(rng.integers(1, 12))
        points, labels = point_prompt(mask, n, rng)
        assert points.shape == (n, 2) and points.dtype == np.float32
        assert labels.dtype == np.int64 and labels.tolist() == [1] * n
        assert all(mask[int(y), int(x)] for x, y in points)
        if mask.sum() >= n:
            assert len({tuple(p) for p in points}) == n
    mask = np.zeros((10, 40), bool)
    mask[2, 33] = True
    assert point_prompt(mask, 3, rng)[0].tolist() == [[33, 2]] * 3  # (x, y), and repeated where it must
    with pytest.raises(ValueError):
        point_prompt(np.zeros((5, 5), bool), 1, rng)


def test_prompt_rng():
    draw = lambda *parts: prompt_rng(*parts).integers(2 ** 60)
    assert draw("case0005_slice012", "liver", 0) == draw("case0005_slice012", "liver", 0)
    keys = [(k, t, s) for k in ("a_slice000", "a_slice001") for t in ORGANS for s in range(3)]
    assert len({draw(*k) for k in keys}) == len(keys)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; " \
           "print(data.prompt_rng('a', 'liver', 1).integers(2 ** 60))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(other.stdout) == draw("a", "liver", 1)  # another process, another hash seed


# --- variations

class Said:
    """Stands for Texts: the words that are said of every sample."""

    def __init__(self, words):
        self.words = words

    def all(self, sample):
        return [self.words]


def arrow(modality, S=64):
    """A picture that tells its orientation: a gray disc with a bright half-disc on its left and a dot at its top."""
    y, x = np.mgrid[:S, :S] - (S - 1) / 2
    disc, left, top = np.hypot(x, y) < S / 3, (np.hypot(x, y) < S / 3) & (x < 0), np.hypot(x, y + S / 4) < S / 12
    image = np.where(left, 200, np.where(disc, 120, 40)).astype(np.uint8)
    image = np.repeat(image[..., None], 3, 2)
    masks = np.stack([disc, left, top])
    return data.Sample(image, masks, ("disc", "half", "top"), (), masks, modality, "case", "key")


def orientation(sample):
    """(mirrored, degrees) of a variation of arrow()."""
    centre, left, top = (np.argwhere(m).mean(0)[::-1] for m in sample.masks)
    (a, b), (c, d) = left - centre, top - centre
    return a * d - b * c < 0, np.degrees(np.arctan2(c, -d))


@pytest.mark.parametrize("modality", [*data.VARIATION, "unknown"])
def test_variations_move_image_and_masks_alike(modality):
    sample, rng = arrow(modality), np.random.default_rng(0)
    for _ in range(20):
        v = vary(sample, Said("round"), rng)
        assert v.image.shape == sample.image.shape and v.image.dtype == np.uint8 and v.masks.dtype == bool
        assert v.masks.shape == sample.masks.shape and v.targets == sample.targets and v.truth.shape == (3, 0, 0)
        inside, outside = v.masks[1], v.masks[0] & ~v.masks[1]
        assert v.image[inside].mean() > v.image[outside].mean() + 20  # the bright half is where its mask says
        assert not np.array_equal(v.image, sample.image)
    same = [vary(sample, Said(""), np.random.default_rng(5)) for _ in range(2)]
    assert np.array_equal(same[0].image, same[1].image) and np.array_equal(same[0].masks, same[1].masks)


def seen(modality, words):
    turns = [orientation(vary(arrow(modality), Said(words), np.random.default_rng(s))) for s in range(60)]
    return {bool(mirrored) for mirrored, _ in turns}, max(abs(d) for _, d in turns)


def test_sides_are_never_swapped_where_a_text_speaks_of_them():
    for words in ("on the patient's left", "Right upper quadrant", "left kidney", "medial to the spleen"):
        for modality in ("ct", "endoscopy", "fundus"):
            assert seen(modality, words)[0] == {False}, (words, modality)
    mirrored, turned = seen("ct", "beside the spine")
    assert mirrored == {False, True} and turned < 16  # a patient is not turned over
    mirrored, turned = seen("dermoscopy", "anywhere on the skin")
    assert mirrored == {False, True} and turned > 120
    assert seen("dermoscopy", "in the upper half")[1] < 16
    assert seen("dermoscopy", "bright and underlined, topical")[1] > 120  # words that only contain such words


def test_which_classes_may_be_mirrored():
    """Of the texts that ship: sided organs never, a polyp and a lesion always."""
    for name, target, modality, mirrored in (("synapse", "liver", "ct", False), ("kvasir", "polyp", "endoscopy", True),
                                             ("sa-med2d", "left ventricle", "mr", False),
                                             ("sa-med2d", "skin lesion", "dermoscopy", True),
                                             ("kits19", "kidney", "ct", True)):
        sample = arrow(modality)
        sample.targets = (target,) * 3
        said = " ".join(Texts(name).all(sample))
        assert bool(data.SIDES.search(said)) != mirrored, (name, target)


def test_a_view_is_the_same_whenever_it_is_asked_for():
    dataset, texts = open_dataset("demo", image_size=64, seed=3), Texts("demo")
    views = {(i, n): dataset.view(i, n, texts) for i in (0, 1) for n in (0, 1, 2)}
    for (i, n), view in reversed(views.items()):
        again = dataset.view(i, n, texts)
        assert np.array_equal(view.image, again.image) and np.array_equal(view.masks, again.masks)
        assert view.truth.size == 0
    assert np.array_equal(views[0, 0].image, dataset[0].image)
    assert not np.array_equal(views[0, 1].image, views[0, 2].image)


# --- texts

EVERYTHING = json.loads((ROOT / "attributes.json").read_text())


def lists(wordings):
    """[(modality or None, [texts])] of an attribute."""
    return list(wordings.items()) if isinstance(wordings, dict) else [(None, wordings)]


def test_attributes_are_complete():
    needed = {"synapse": ORGANS, "demo": ORGANS, "kits19": ("kidney", "kidney tumor"), "kvasir": ("polyp",)}
    for name, classes in needed.items():
        Texts(name).check([(target, "endoscopy" if name == "kvasir" else "ct") for target in classes])
    every = []
    for entry in EVERYTHING.values():
        for target, attributes in entry.items() if isinstance(entry, dict) else ():
            assert set(attributes) == set(ATTRIBUTES), target
            for kind in ATTRIBUTES:
                for modality, texts in lists(attributes[kind]):
                    assert len(set(texts)) == len(texts) >= 4, (target, kind)
                    assert modality in (None, "ct", "mr", "pet", "ultrasound", "x-ray", "endoscopy", "dermoscopy",
                                        "fundus")
                    every += texts
    for text in every:
        assert 4 <= len(text.split()) <= 26 and text == text.strip() and text.isascii(), text


def test_texts_fit_the_context_of_clip():
    """Nothing of a text is cut off: the end-of-text token is not the last of the 77."""
    tokenize = open_clip.get_tokenizer("ViT-B-16")
    texts = [t for entry in EVERYTHING.values() if isinstance(entry, dict) for a in entry.values()
             for kind in ATTRIBUTES for _, wordings in lists(a[kind]) for t in wordings]
    assert (tokenize(texts).argmax(1) < 76).all()


def test_texts_of_the_real_samples(linked):
    """Every class of the real SA-Med2D images has texts for the modality that shows it."""
    Texts("sa-med2d").check(SAMed2D(linked("sa-med2d-mini"), "train").pairs)


@pytest.mark.parametrize("target, patient, image", [
    ("right kidney", "right", "left"), ("liver", "right", "left"), ("gallbladder", "right", "left"),
    ("left kidney", "left", "right"), ("spleen", "left", "right"), ("stomach", "left", "right")])
def test_sides(target, patient, image):
    """Every position says the patient's side and the image's, which is the other, and neither the wrong way round."""
    def of_patient(side, text):
        return re.search(rf"patient's {side}|{side} (upper abdomen|retroperitoneum) of the patient", text)

    def of_image(side, text):
        return re.search(rf"{side}( \w+)? of the (spine in the )?image|image's (\w+ )?{side}|image {side}", text)

    for text in KNOWN.wordings(target, "ct", "position"):
        assert of_patient(patient, text) and of_image(image, text), text
        assert not of_patient(image, text) and not of_image(patient, text), text


def test_attribute_texts():
    first = KNOWN("liver", "ct")
    wordings = {kind: KNOWN.wordings("liver", "ct", kind) for kind in ATTRIBUTES}
    assert first == {kind: wordings[kind][0] for kind in ATTRIBUTES} == KNOWN("liver", "ct")
    rng = np.random.default_rng(0)
    drawn = [KNOWN("liver", "ct", rng=rng) for _ in range(200)]
    for kind in ATTRIBUTES:
        assert {d[kind] for d in drawn} == set(wordings[kind])
    assert len({tuple(d.values()) for d in drawn}) > 50  # the attributes are drawn apart
    fails(lambda: KNOWN("heart", "ct"), "attributes.json", "class heart", '"heart": {"position"')


def test_the_look_may_depend_on_the_modality(tmp_path):
    path = tmp_path / "a.json"
    organ = {"position": ["p"], "texture": {"ct": ["gray"], "mr": ["bright"]}, "shape": ["s"]}
    path.write_text(json.dumps({"mine": {"liver": organ}}))
    texts = Texts("mine", path)
    assert texts("liver", "ct")["texture"] == "gray" and texts("liver", "mr")["texture"] == "bright"
    assert texts("liver", "mr")["shape"] == "s"
    fails(lambda: texts("liver", "pet"), path, "mine, liver, texture: nothing for pet, only for ct, mr",
          '"pet": ["..."]')
    fails(lambda: texts.check([("liver", "ct"), ("liver", "pet")]), "pet")


def test_bad_attributes(tmp_path):
    path, organ = tmp_path / "a.json", {kind: ["one", "two"] for kind in ATTRIBUTES}
    good, pairs = {"synapse": {target: organ for target in ORGANS}}, [(organ, "ct") for organ in ORGANS]

    def refuses(content, *words, name="synapse"):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        fails(lambda: Texts(name, path).check(pairs), path, *words)

    fails(lambda: Texts("synapse", path), path)
    refuses("{", "not JSON")
    refuses("[]", "no texts for data set synapse")
    refuses(good, "no texts for data set kits19", '"kits19": {', '"position": ["..."]', name="kits19")
    refuses({"demo": "kits19", **good}, "demo", name="demo")
    refuses({"synapse": {t: organ for t in ORGANS[1:]}}, "class spleen", '"spleen": {"position"')
    for bad in ([], [""], ["good", "  "], "text", None, [3], {"mr": ["x"]}, {"ct": [" "]}):
        refuses({"synapse": {**good["synapse"], "aorta": {**organ, "shape": bad}}}, "synapse, aorta, shape")
    path.write_text(json.dumps({"demo": "synapse", "mine": {"heart": organ}, **good}))
    assert Texts("demo", path).classes == Texts("synapse", path).classes == good["synapse"]
    assert Texts("mine", path)("heart", "ct") == {kind: "one" for kind in ATTRIBUTES}


def test_texts_of_single_images(tmp_path):
    path, sample = tmp_path / "texts.jsonl", SAMPLES[0]
    target, *others = sample.targets
    lines = [dict(image=sample.key, target=target, position="here", shape=["round", "oval"]), None,
             dict(image=sample.case, target=others[0], texture="dark"),
             dict(image="elsewhere", target=target, position="there", texture="x", shape="y")]
    path.write_text("\n".join(json.dumps(line) if line else "" for line in lines))
    texts = Texts("demo", per_image=path)
    plain = KNOWN(target, "ct")
    assert texts(target, "ct", sample) == {**plain, "position": "here", "shape": "round"}
    assert texts(others[0], "ct", sample) == {**KNOWN(others[0], "ct"), "texture": "dark"}  # by its case
    assert texts(target, "ct", SAMPLES[1]) == plain == texts(target, "ct")
    rng = np.random.default_rng(0)
    assert {texts(target, "ct", sample, rng)["shape"] for _ in range(40)} == {"round", "oval"}
    assert "here" in texts.all(sample) and "there" not in texts.all(sample)
    batch = make_batch([sample], texts, rng, 9, 0.0)
    assert batch.texts[batch.targets.index(target)]["position"] == "here"
    for bad, words in (('{"image": "a"}', "line 2: not {"), ("[1]", "line 2"), ("{", "line 2"),
                       ('{"image": "a", "target": 3}', "should be texts"),
                       ('{"image": "a", "target": "b", "shape": " "}', "line 2: shape is empty"),
                       ('{"image": "a", "target": "b", "shape": []}', "line 2: shape is empty"),
                       (json.dumps(lines[0]), "second time")):
        path.write_text(json.dumps(lines[0]) + "\n" + bad)
        fails(lambda: Texts("demo", per_image=path), path, words)
    fails(lambda: Texts("demo", per_image=tmp_path / "no.jsonl"), "no.jsonl")


# --- batches



def batch_of(samples, prompt, rng, max_targets=4, absent=0.25, points=1, noise=True):
    return add_prompts(make_batch(samples, KNOWN, rng, max_targets, absent), prompt, rng, points, noise)


@pytest.mark.parametrize("prompt", ["none", "point", "box"])
def test_batches(prompt):
    for seed in range(25):
        rng = np.random.default_rng(seed)
        samples = [SAMPLES[i] for i in rng.permutation(4)[:rng.integers(1, 5)]]
        n, most = int(rng.integers(1, 4)), int(rng.integers(1, 9))
        batch = batch_of(samples, prompt, rng, max_targets=most, points=n)
        m = len(batch.targets)
        assert batch.images.shape == (len(samples), 3, 64, 64) and batch.images.dtype == torch.uint8
        assert batch.index.dtype == torch.int64 and batch.masks.dtype == torch.bool
        assert batch.index.shape == (m,) and batch.masks.shape == (m, 64, 64) and len(batch.texts) == m
        assert torch.bincount(batch.index, minlength=len(samples)).max() <= most
        assert len(set(zip(batch.index.tolist(), batch.targets))) == m  # without replacement
        assert batch.points is None or batch.boxes is None
        assert prompt == ("box" if batch.boxes is not None else "point" if batch.points else "none")
        for b, sample in enumerate(samples):
            assert np.array_equal(batch.images[b].permute(1, 2, 0).numpy(), sample.image)
        for i, (b, target, texts) in enumerate(zip(batch.index.tolist(), batch.targets, batch.texts)):
            sample = samples[b]
            mask = sample.masks[sample.targets.index(target)] if target in sample.targets else np.zeros((64, 64), bool)
            assert np.array_equal(batch.masks[i].numpy(), mask)
            assert all(texts[kind] in KNOWN.wordings(target, "ct", kind) for kind in ATTRIBUTES)
            if batch.boxes is not None:
                assert abs(batch.boxes[i].numpy() - box_prompt(mask)).max() <= 5
            if batch.points:
                assert all(mask[int(y), int(x)] for x, y in batch.points[0][i])
        if batch.boxes is not None:
            assert batch.boxes.shape == (m, 4) and batch.boxes.dtype == torch.float32
        if batch.points:
            assert batch.points[0].shape == (m, n, 2) and batch.points[1].shape == (m, n)
            assert batch.points[1].dtype == torch.int64 and batch.points[1].eq(1).all()


def test_absent_targets():
    sample = next(s for s in SAMPLES if s.absent)
    rng = np.random.default_rng(0)
    for absent in (0.0, 0.25, 1.0):
        batches = [batch_of([sample] * 4, "none", rng, max_targets=1, absent=absent) for _ in range(80)]
        empty = np.mean([not m.any() for b in batches for m in b.masks])
        assert abs(empty - absent) < 0.08
    assert batch_of([sample], "box", rng, absent=1.0).masks.any((1, 2)).all()
    exact = batch_of([sample], "box", rng, noise=False)
    assert all(np.array_equal(b, box_prompt(m)) for b, m in zip(exact.boxes.numpy(), exact.masks.numpy()))


def test_empty_batch():
    nothing = make_sample(Picture(np.zeros((32, 32)), np.zeros((0, 32, 32), bool), (), ORGANS, "ct"), 32, "a", "a")
    rng = np.random.default_rng(0)
    box = batch_of([nothing], "box", rng)
    point = batch_of([nothing], "point", rng, points=3)
    assert box.masks.shape == (0, 32, 32) and box.boxes.shape == (0, 4) and box.index.shape == (0,)
    assert point.points[0].shape == (0, 3, 2) and point.points[1].shape == (0, 3) and point.targets == []
    fails(lambda: batch_of([nothing], "scribble", rng), "--prompt scribble")



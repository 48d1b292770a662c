"""texts.py: attributes.json is complete and says what is so; texts of single images; texts otherwise than they should be."""
import json
import re

import numpy as np
import open_clip
import pytest

from common import ATTRIBUTES, InputError
from conftest import ROOT, fails
from data import make_batch, open_dataset
from readers.sa_med2d import SAMed2D
from readers.synapse import ORGANS
from texts import Rephrased, Texts

KNOWN = Texts("synapse")
SAMPLES = [open_dataset("demo", image_size=64)[i] for i in range(2)]
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


def test_texts_otherwise_than_they_should_be():
    texts, pairs = Texts("demo"), [(name, "ct") for name in ORGANS]
    own = [texts(name, "ct") for name in ORGANS]
    assert [Rephrased(texts, "wrong", pairs)(name, "ct") for name in ORGANS] == own[1:] + own[:1]
    reworded = [Rephrased(texts, "reworded", pairs)(name, "ct") for name in ORGANS]
    assert all(a[k] != b[k] and b[k] in texts.wordings(n, "ct", k) for n, a, b in zip(ORGANS, own, reworded) for k in a)
    assert set(Rephrased(texts, "empty", pairs)("liver", "ct").values()) == {""}
    with pytest.raises(InputError, match="--text wrong"):
        Rephrased(Texts("kvasir"), "wrong", [("polyp", "endoscopy")])

"""texts.py: attributes.json is complete and says what is so; texts of single images; texts otherwise than they should be."""
import json
import pickle
import re

import numpy as np
import open_clip
import pytest

from common import ATTRIBUTES, InputError
from conftest import ROOT, fails
from data import make_batch, open_dataset
from readers.sa_med2d import SAMed2D
from readers.synapse import ORGANS
from texts import Rephrased, Texts, split_wordings

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
                    assert len({t.lower() for t in texts}) == len(texts) >= 15, (target, kind)
                    assert modality in (None, "ct", "mr", "pet", "ultrasound", "x-ray", "endoscopy", "dermoscopy",
                                        "fundus")
                    every += texts
    for text in every:
        assert len(text.split()) <= 40 and text == text.strip() and text.isascii(), text


def test_no_wording_is_of_two_structures():
    """Nor is one that is held out of training drawn there for another data set's class of the name."""
    classes, trained, held = {}, set(), set()
    for entry in EVERYTHING.values():
        for target, attributes in entry.items() if isinstance(entry, dict) else ():
            for kind in ATTRIBUTES:
                for _, texts in lists(attributes[kind]):
                    for text in texts[5:]:
                        assert classes.setdefault(text.lower(), target) == target, text
                    trained.update(split_wordings(texts)[0]), held.update(split_wordings(texts)[1])
    assert not trained & held and 0.15 < len(held) / len(trained | held) < 0.2


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
    """The first positions say the patient's side and the image's, which is the other; none has them swapped."""
    def of_patient(side, text):
        return re.search(rf"patient's {side}|{side} (upper abdomen|retroperitoneum) of the patient", text)

    def of_image(side, text):
        return re.search(rf"{side}( \w+)? of the (spine in the )?image|image's (\w+ )?{side}|image {side}|"
                         rf"{side}[\w -]* of the (image|picture|scan)\b", text, re.I)

    for text in KNOWN.wordings(target, "ct", "position")[:5]:
        assert of_patient(patient, text) and of_image(image, text), text
    for text in [*KNOWN.wordings(target, "ct", "position"), *Texts("sa-med2d").wordings(target, "ct", "position")]:
        said = text.lower().replace(target, "")
        assert not of_patient(image, said) and not of_image(patient, said), text


def test_attribute_texts():
    first = KNOWN("liver", "ct")
    wordings = {kind: KNOWN.wordings("liver", "ct", kind) for kind in ATTRIBUTES}
    assert first == {kind: wordings[kind][0] for kind in ATTRIBUTES} == KNOWN("liver", "ct")
    rng = np.random.default_rng(0)
    drawn = [KNOWN("liver", "ct", rng=rng) for _ in range(900)]
    for kind in ATTRIBUTES:
        assert {d[kind] for d in drawn} == set(split_wordings(wordings[kind])[0])
    assert len({tuple(d.values()) for d in drawn}) > 800  # the attributes are drawn apart
    last = {kind: len(wordings[kind]) - 1 for kind in ATTRIBUTES}  # by number every wording can be had
    assert all(KNOWN("liver", "ct", number=n)[kind] == wordings[kind][-1] for kind, n in last.items())
    fails(lambda: KNOWN("heart", "ct"), "attributes.json", "class heart", '"heart": {"position"')


def test_a_share_of_the_draws_is_the_name_alone():
    texts, plain = Texts("synapse"), Texts("synapse")
    texts.bare = 0.25
    for draw in (lambda rng: texts("liver", "ct", rng=rng), texts.concepts()["liver"]):
        rng = np.random.default_rng(0)
        drawn = [draw(rng) for _ in range(800)]
        bare = [text == dict.fromkeys(ATTRIBUTES, "liver") for text in drawn]
        assert 0.2 < np.mean(bare) < 0.3
        assert not any("liver" in text.values() for text, alone in zip(drawn, bare) if not alone)
    assert texts("liver", "ct") == plain("liver", "ct") and texts.held_out("liver", "ct") == plain.held_out("liver", "ct")


@pytest.mark.parametrize("n, held", [(1, 0), (4, 0), (5, 1), (9, 1), (10, 2), (27, 5)])
def test_the_last_fifth_is_held_out(n, held, tmp_path):
    wordings = [f"text {i}" for i in range(n)]
    assert split_wordings(wordings) == (wordings[:n - held], wordings[n - held:])
    (tmp_path / "a.json").write_text(json.dumps({"mine": {"liver": dict.fromkeys(ATTRIBUTES, wordings)}}))
    texts, rng = Texts("mine", tmp_path / "a.json"), np.random.default_rng(0)
    assert {texts("liver", "ct", rng=rng)["shape"] for _ in range(50 * n)} == set(wordings[:n - held])
    found = [texts.held_out("liver", "ct", k)["shape"] for k in range(2 * n)]
    assert set(found) == set(wordings[n - held:] or wordings[1:2] or wordings)
    assert not held or found[:held + 1] == [*wordings[n - held:], wordings[n - held]]


def test_concepts_are_those_of_every_data_set(tmp_path):
    """By name, whatever the data set or the modality, and an alias says nothing new."""
    organ = lambda *texts: {kind: list(texts) for kind in ATTRIBUTES}
    looks = {**organ("b"), "texture": {"ct": ["c"], "mr": ["d"]}, "shape": {"mr": ["e"], "ct": ["f"], "pet": ["g"]}}
    content = {"demo": "one", "one": {"liver": organ(*"1234567890"), "heart": organ("a")}, "two": {"liver": looks}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    concepts, rng = pickle.loads(pickle.dumps(Texts("demo", tmp_path / "a.json").concepts())), np.random.default_rng(0)
    assert list(concepts) == ["liver", "heart"]
    drawn = [tuple(concepts["liver"](rng).values()) for _ in range(900)]
    assert {d for d in drawn if d[0] == "b"} == {("b", "c", "f"), ("b", "d", "e")}
    assert {d[1] for d in drawn} == set("12345678cd") and 250 < sum(d[0] == "b" for d in drawn) < 750
    content["two"]["liver"]["shape"]["mr"] = []
    (tmp_path / "a.json").write_text(json.dumps(content))
    fails(lambda: Texts("demo", tmp_path / "a.json").concepts(), "two, liver, shape, mr")
    assert KNOWN.concepts().keys() == {c for entry in EVERYTHING.values() if isinstance(entry, dict) for c in entry}


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
    refuses("[]", "not a JSON object")
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
             dict(image=sample.case, target=target, position="by the case", texture="gray"),
             dict(image="elsewhere", target=target, position="there", texture="x", shape="y")]
    lines[2]["texture"] = "dark\x85\u2028here"  # a line ends at \n alone
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) if line else "" for line in lines), encoding="utf-8")
    texts = Texts("demo", per_image=path)
    plain = KNOWN(target, "ct")
    assert texts(target, "ct", sample) == {"position": "here", "texture": "gray", "shape": "round"}
    assert texts(others[0], "ct", sample) == {**KNOWN(others[0], "ct"), "texture": lines[2]["texture"]}  # by its case
    assert texts(target, "ct", SAMPLES[1]) == plain == texts(target, "ct")
    rng = np.random.default_rng(0)
    assert {texts(target, "ct", sample, rng)["shape"] for _ in range(40)} == {"round", "oval"}
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
    assert reworded == [texts.held_out(name, "ct") for name in ORGANS]
    assert all(b[k] in split_wordings(texts.wordings(n, "ct", k))[1] for n, b in zip(ORGANS, reworded) for k in b)
    sample = SAMPLES[0]
    single = Texts("demo")
    single.images = {(sample.key, "liver"): {"shape": ["round", "oval"]}}
    changed = Rephrased(single, "reworded", pairs)("liver", "ct", sample)
    assert changed == {**texts.held_out("liver", "ct"), "shape": "oval"}  # the second of a list too short to split
    assert Rephrased(single, "own", pairs)("liver", "ct", sample)["shape"] == "round"
    assert set(Rephrased(texts, "empty", pairs)("liver", "ct").values()) == {""}
    with pytest.raises(InputError, match="--text wrong"):
        Rephrased(Texts("kvasir"), "wrong", [("polyp", "endoscopy")])


def test_the_words_kept_for_testing_are_in_no_training():
    """paper/words.json: each class in six manners or twelve, each a text of its own; none is in attributes.json, but for
    single words ("bean")."""
    plain = lambda wording: " ".join(re.findall(r"[a-z0-9]+", wording.lower()))
    known = {plain(w) for w in strings(json.loads((ROOT / "attributes.json").read_text()))}
    ours = Texts("synapse")
    for other in (Texts("synapse", ROOT / "paper/words.json"), Texts("demo", ROOT / "paper/words.json")):
        assert set(other.classes) == set(ours.classes)
        for name in other.classes:
            found = [text for kind in ATTRIBUTES for text in other.wordings(name, "ct", kind)]
            assert len(set(found)) == len(found) and len(found) in (18, 36), name
            assert not {plain(w) for w in found if " " in w} & known, name
    hard = json.loads((ROOT / "paper/hard_words.json").read_text())
    assert set(hard["negated"]) == set(ours.classes) and len(hard["nonsense"]) >= 10
    assert not {plain(w) for w in strings(hard)} & known


def strings(value):
    """All texts within lists and objects of JSON."""
    if isinstance(value, str):
        return [value]
    return [s for v in (value.values() if isinstance(value, dict) else value) for s in strings(v)]


def test_texts_that_match_nothing_are_said(tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps(dict(image=image, target=target, shape="round")) for image, target in (
        ("a", "liver"), ("a", "spleen"), ("b", "liver"))))
    texts = Texts("demo", per_image=path)
    texts.check_images(["a"], ["liver", "spleen"])
    assert capsys.readouterr().out == ""
    texts.check_images(["a", "b"], ["spleen"])
    assert "no line for spleen of b" in capsys.readouterr().out
    fails(lambda: texts.check_images(["c"], ["liver"]), path, "no line for liver of c", "liver of a, spleen of a")
    source = open_dataset("demo").source
    source.classes, source.key = ("liver",), lambda i: "a"
    assert "2 of 3 lines" in texts.unused([source]) and "spleen of a, liver of b" in texts.unused([source])
    source.classes = ("aorta",)
    assert "3 of 3 lines" in texts.unused([source]) and "called like a, a class like aorta" in texts.unused([source])
    assert Texts("demo").unused([source]) == ""
    for line, words in ((dict(image="a", target="liver", texure="x"), "texure is not one of position"),
                        (dict(image="a", target="liver"), "says nothing")):
        path.write_text(json.dumps(line))
        fails(lambda: Texts("demo", per_image=path), path, "line 1", words)


@pytest.mark.parametrize("space", ["\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c"])
def test_lines_end_at_line_feeds_alone(tmp_path, space):
    path, text = tmp_path / "t.jsonl", f"left{space}of it"
    for ascii in (True, False):
        path.write_text(json.dumps(dict(image="a", target="liver", position=text), ensure_ascii=ascii) + "\r\n",
                        encoding="utf-8")
        assert Texts("demo", per_image=path).images["a", "liver"] == dict(position=[text])


def test_unknown_names_list_the_known(tmp_path):
    fails(lambda: Texts("synapse")("livr", "ct"), "livr", "it has liver, ", "spleen")
    fails(lambda: Texts("nothere"), "nothere", "synapse", "kvasir")

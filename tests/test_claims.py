"""What the texts are worth: the questions, their answers' counts, differences and intervals, resuming, the page."""
import sys

import numpy as np
import pytest
import torch

from common import ATTRIBUTES, seeded
from conftest import fails
from inference import decode_targets
from medsegr import modulate
from paper import claims
from readers.synapse import ORGANS

NAMES = ("spleen", "left kidney", "liver")


@pytest.fixture(scope="module")
def words():
    return claims.Wordings("demo")


@pytest.fixture
def sample():
    class Slice:
        key, case, modality, targets = "a", "case", "ct", ("left kidney", "liver")
        masks = np.zeros((2, 64, 64), bool)
    Slice.masks[0, 10:20, 40:50] = Slice.masks[1, 10:40, 5:30] = True
    return Slice


# ---------------------------------------------------------------------------------------------------------------------
# Questions

def test_emptied_is_empty_and_swapped_is_the_others(words, sample):
    own = {name: words.texts(name, "ct") for name in NAMES}
    asked = words.questions(sample, NAMES, ["liver"])
    assert [q.name for q in asked if q.how == "own"] == list(NAMES)
    assert all(q.texts == own[q.name] for q in asked if q.how == "own" or q.how in claims.SWITCHED_OFF)
    of = lambda how: [q for q in asked if q.how == how]
    for kind in ATTRIBUTES:
        [q] = of(f"{kind}: emptied")
        assert q.texts == own["liver"] | {kind: ""}
    assert of("all three: emptied")[0].texts == dict.fromkeys(ATTRIBUTES, "")
    places = of("position: another's")
    assert {q.other for q in places} == {"spleen", "left kidney"}
    assert all(q.texts == own["liver"] | {"position": own[q.other]["position"]} for q in places)
    [q] = of("texture and shape: another's")
    assert q.other in NAMES and q.other != "liver" and q.texts == own[q.other] | {"position": own["liver"]["position"]}
    assert all(q.texts in words.nonsense for q in of("nonsense")) and len(of("nonsense")) == claims.NONSENSE


def test_other_words_are_other_words(words, sample):
    asked = words.questions(sample, NAMES, ["liver"])
    own = words.texts("liver", "ct")
    for how in ("held-out wordings", "paper/words.json", "told by what it is not", "its name alone"):
        found = [q.texts for q in asked if q.how == how]
        assert found and len({str(x) for x in found}) == len(found)
        assert not any(set(text.values()) & set(own.values()) for text in found)
    [q] = [q for q in asked if q.how.startswith("negated")]
    assert all(q.texts[kind] == f"not the liver, not {own[kind]}" for kind in ATTRIBUTES)
    assert asked == words.questions(sample, NAMES, ["liver"])  # the same words every time


@pytest.mark.parametrize("text, other", [
    ("Left of the image, the patient's right", "Right of the image, the patient's left"),
    ("bright, upright, leftover", "bright, upright, leftover"), ("left kidney", "right kidney")])
def test_mirrored(text, other):
    assert claims.mirrored(text) == other and claims.mirrored(other) == text


def test_fewer_slices_stand_at_the_start_of_more_and_all_classes_come_often():
    rng = seeded("present")
    present = {i: [name for name in ORGANS if rng.random() < 0.25] for i in range(150)}
    many = claims.choose_slices(present, 60)
    assert claims.choose_slices(present, 17) == many[:17] and len({i for i, _ in many}) == 60
    assert all(1 <= len(names) <= claims.CHANGED and set(names) <= set(present[i]) for i, names in many)
    times = [sum(name in names for _, names in many) for name in ORGANS]
    assert min(times) >= 10 and max(times) - min(times) <= 3
    assert claims.choose_slices(present, 1000, seed=1)[0] != many[0]
    assert len(claims.choose_slices(present, 1000)) == sum(map(bool, present.values()))
    assert not claims.choose_slices({0: [], 1: []}, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Answers

def test_switched_off_operators_change_nothing(model, words):
    texts = [words.texts(name, "ct") for name in NAMES]
    features, index = torch.randn(1, 256, 8, 8), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        priors = model[0].encode_attributes(texts)
        before = modulate(features, index, priors)
        assert all((x - features[0]).abs().mean() > 1e-3 for x in before)
        claims.switch_off(priors, ["all three switched off", "own", "T_attr: the mean structure's"], [1])
        after = modulate(features, index, priors)
    assert torch.allclose(after[0], features[0], atol=1e-5)
    assert torch.equal(after[1:], before[1:])
    assert torch.equal(priors.T_attr[2], priors.T_attr[1])


def test_answers_are_those_of_inference_and_counts_are_by_hand(model, words, sample):
    asked = words.questions(sample, NAMES, ["liver"])
    features = torch.randn(1, 256, 8, 8, generator=torch.Generator().manual_seed(0))
    masks, iou, A_pos = claims.answer_all(model[0], features, asked)
    plain = [m for m, q in enumerate(asked) if q.how not in claims.SWITCHED_OFF]
    answer = decode_targets(model[0], features, [asked[m].texts for m in plain], empty=True)
    assert (masks[plain] == (answer.grid > 0).numpy()).mean() > 0.999
    assert np.allclose(iou[plain], answer.iou, atol=1e-4)
    truth, *rows = claims.measure(model[0], features, sample, asked, list(NAMES))
    assert truth["inside"] == [0, 100, 750] and truth["gain"] == [None, 100 / 4096, 750 / 4096]
    for row, mask, q in zip(rows, masks, asked):
        assert row["size"] == mask.sum() and row["inside"] == [0, *(mask & sample.masks).sum((1, 2))]
        assert (row["name"], row["how"], row["other"]) == q[:3]
        assert (row["gain"] is not None) == (q.how == "own")
        assert row["gain"] is None or row["gain"][0] is None and all(0 <= x <= 1 for x in row["gain"][1:])


# ---------------------------------------------------------------------------------------------------------------------
# Dice, differences, scores

def made(images=12, seed=0):
    """Rows of slices in which a structure is found by half in its own words, not at all in others."""
    rng, rows = np.random.default_rng(seed), []
    for n in range(images):
        about = dict(image=f"i{n}", case=f"c{n % 3}")
        area = rng.integers(50, 100, 3) * (np.arange(3) != n % 4)
        rows.append(about | dict(name="", how="truth", other="", size=0, iou=0.0, inside=area.tolist(),
                                 gain=[0.25 if a else None for a in area.tolist()]))
        for k, name in enumerate(NAMES):
            inside = [0, 0, 0]
            inside[k] = int(area[k] // 2)
            gain = [(0.5 if i == k else 0.125) if a else None for i, a in enumerate(area.tolist())]
            rows.append(about | dict(name=name, how="own", other="", size=inside[k], iou=0.9 if area[k] else 0.0,
                                     inside=inside, gain=gain))
        k = (n + 1) % 4 % 3
        if area[k]:
            for how in [f"{kind}: emptied" for kind in ATTRIBUTES] + list(claims.SWITCHED_OFF):
                rows.append(about | dict(name=NAMES[k], how=how, other="", size=0, iou=0.1, inside=[0] * 3, gain=None))
            for other in NAMES:
                if other != NAMES[k]:
                    rows.append(about | dict(name=NAMES[k], how="position: another's", other=other, size=40, iou=0.5,
                                             inside=np.minimum(area, 10).tolist(), gain=None))
        rows.append(about | dict(name="", how="nonsense", other="0", size=n % 2, iou=0.2, inside=[0] * 3, gain=None))
    return rows


def test_matrices_have_a_row_a_structure_and_numbers_are_by_hand(monkeypatch):
    monkeypatch.setattr(claims, "FEW", 2)
    rows = made()
    found = claims.Found(rows, NAMES, draws=200)
    text, drawn = claims.report(found)
    assert drawn["swaps"][0].shape == drawn["places"][0].shape == drawn["lift"].shape == (3, 3)
    assert drawn["swaps"][1].dtype == bool
    for k, name in enumerate(NAMES):  # Dice of the pooled pixels
        mine = [row for row in rows if row["how"] == "own" and row["name"] == name]
        area = sum(row["inside"][k] for row in rows if row["how"] == "truth")
        expected = 2 * sum(row["inside"][k] for row in mine) / (area + sum(row["size"] for row in mine))
        assert found.dice(found.counts("own"))[k] == pytest.approx(expected)
        assert np.diag(drawn["swaps"][0])[k] == 0  # in one's own words nothing is lost
        others = np.delete(drawn["swaps"][0][k], k)
        assert np.allclose(others, expected)  # another's words find nothing of it
        assert np.isnan(drawn["places"][0][k, k])
    value, low, high, real = drawn["changes"]["texture: emptied"]
    assert len(value) == 4 and (low <= value).all() and (value <= high).all() and real.all()
    assert np.allclose(np.diag(drawn["lift"]), 2) and np.allclose(drawn["lift"][0, 1:], 0.5)
    assert "| spleen | 0.500 | 0.250 | 2.00 | 2.00 - 2.00 | 1 of 3 |" in text


def test_of_few_slices_nothing_is_real():
    found = claims.Found(made(4), NAMES, draws=100)
    assert not found.compare(found.counts("texture: emptied"))[3].any()


def test_the_bootstrap_draws_cases_and_their_slices():
    times = claims.two_stage(np.array(["a", "a", "a", "b", "b", "b"]), 500, 0)
    assert (times.sum(1) == 6).all() and {0, 3, 6} == set(times[:, :3].sum(1))
    assert times.mean(0) == pytest.approx(np.ones(6), abs=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_area_under_roc_is_scikit_learns(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    yes, no = rng.integers(0, 9, 40) / 8, rng.integers(0, 7, 30) / 8
    labels = np.repeat([1, 0], [40, 30])
    assert claims.area_under_roc(yes, no) == pytest.approx(metrics.roc_auc_score(labels, np.append(yes, no)))
    times = rng.integers(0, 3, 70)
    weighted = claims.area_under_roc(yes, no, (times[None, :40], times[None, 40:]))
    assert weighted == pytest.approx(metrics.roc_auc_score(labels, np.append(yes, no), sample_weight=times))


@pytest.mark.parametrize("n", (1, 7, 20, 100, 333))
def test_threshold_lets_no_more_through_than_it_says(n):
    rng = np.random.default_rng(n)
    for scores in (rng.random(n), rng.integers(0, 4, n) / 4, np.zeros(n), np.ones(n)):
        for share in (0.01, 0.05, 0.2):
            least = claims.threshold(scores, share)
            assert (scores > least).mean() <= share
            assert least == 0 or (scores >= least).mean() > share  # and a lower one would let more through


def test_dice_above_counts_what_is_found_in_vain():
    rows = made()
    found = claims.Found(rows, NAMES, draws=10)
    assert claims.dice_above(found, 0.0) == pytest.approx(found.dice(found.counts("own"))[-1])
    assert claims.dice_above(found, 0.95) == 0
    vain = next(row for row in rows if row["how"] == "own" and row["iou"] == 0)
    vain.update(size=50, iou=0.4)
    assert claims.dice_above(found, 0.3) < claims.dice_above(found, 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# The command

def test_a_run_that_is_resumed_gives_the_same_numbers(model, tmp_path, monkeypatch, capsys):
    calls, measure, page = [], claims.measure, tmp_path / "claims.md"
    page.write_text(f"before\n{claims.START}\nstale\n{claims.END}\nafter\n")

    def counted(*args):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(1)
        return measure(*args)

    def command(file, slices, *more):
        monkeypatch.setattr(sys, "argv", ["claims.py", "texts", "--checkpoint", str(model[1]), "--dataset", "demo",
                                          "--cache", "none", "--slices", str(slices), "--json", str(file), *more])
        claims.main()
        return capsys.readouterr().out

    def quick(model, features, asked):
        """Circles that depend on the texts alone, in place of a model's answers."""
        draws = [seeded(q.how, *q.texts.values()).random(4) for q in asked]
        y, x = np.mgrid[:64, :64] / 64
        masks = [(x - a) ** 2 + (y - b) ** 2 < 0.1 * c for a, b, c, _ in draws]
        return np.array(masks), np.array([d for *_, d in draws]), torch.ones(len(asked), 14, 14) * 1.5

    monkeypatch.setattr(claims, "measure", counted)
    monkeypatch.setattr(claims, "answer_all", quick)
    monkeypatch.setattr(claims, "load_checkpoint", lambda path: (model[0], dict(dataset="demo")))
    stop = None
    whole = command(tmp_path / "whole.json", 3)
    stop, calls[:] = 1, []
    with pytest.raises(KeyboardInterrupt):
        command(tmp_path / "parts.json", 2)
    stop = None
    assert command(tmp_path / "parts.json", 3, "--page", str(page)) == whole
    assert len(calls) == 3 and not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "parts.json").read_text() == (tmp_path / "whole.json").read_text()
    assert command(tmp_path / "parts.json", 3) == whole and len(calls) == 3  # read back
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "Table E" in text and "stale" not in text
    assert len(list(tmp_path.glob("claims-*.png"))) == 4


def test_a_page_without_marks_and_a_data_set_of_one_class(tmp_path, monkeypatch, real_data, model):
    page = tmp_path / "x.md"
    page.write_text("no marks")
    fails(lambda: claims.fill_page(page, "text"), page, claims.START)
    monkeypatch.setattr(sys, "argv", ["claims.py", "texts", "--checkpoint", str(model[1]), "--dataset", "kvasir",
                                      "--data", str(real_data / "kvasir"), "--json", str(tmp_path / "x.json")])
    fails(claims.main, "--dataset kvasir", "one class")

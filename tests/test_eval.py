"""Evaluation: real data, going on after a kill, several processes, pictures, and bad input."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import eval as evaluation
from common import LIGHT, InputError
from conftest import ROOT
from data import open_dataset
from medsegr import Config, MedSegR
from texts import Texts, split_wordings


def test_lite_medsam_on_real_ct(real_data, tmp_path):
    """The untouched backbone with boxes, on real slices: wrong preprocessing or coordinates would show here."""
    sys.path.insert(0, str(real_data))
    from layout import EIGHT, case
    image, label, _ = case("0010")
    lut = np.zeros(14, np.uint8)
    lut[list(EIGHT)] = list(EIGHT.values())
    import h5py
    (tmp_path / "test_vol_h5").mkdir()
    with h5py.File(tmp_path / "test_vol_h5/case0010.npy.h5", "w") as f:
        f["image"], f["label"] = image[60:100:10] / np.float32(255), lut[label[60:100:10]]
    dataset = open_dataset("synapse", tmp_path, "test", 256)
    model = MedSegR(Config(**LIGHT, branches=("sam",))).eval()
    predictor = evaluation.Predictor(model, Texts("synapse"), "box")
    (tmp_path / "spacing.json").write_text('{"case0010": [3.0, 2.0, 2.0]}')
    volumes, targets = evaluation.evaluate(predictor, dataset, progress=False)
    table = evaluation.summarise(volumes, "target")
    assert table["mean"]["dice_strict"] > 0.85, table
    # millimetres: of the same borders
    mm = evaluation.summarise(volumes, "target")["mean"]["hd95_strict_mm"]
    assert table["mean"]["hd95_strict"] < mm < 3.1 * table["mean"]["hd95_strict"]
    # the slices' structures, each with what figure 3 needs
    assert 0 < len(targets) == sum(len(dataset[i].targets) for i in range(len(dataset)))
    assert (targets["area"] > 0).all() and targets["overlap"].max() > 0.2 and targets["hd95"].isna().all()


@pytest.mark.parametrize("flags,named", [
    (["--checkpoint", "out"], "--backbone"), (["--prompt", "none"], "--prompt none"),
    (["--dataset", "brats"], "--dataset brats"), (["--dataset", "synapse", "--data", "/no/data"], "/no/data"),
    (["--prompt", "lasso"], "--prompt"), (["--points", "0"], "--points"), (["--limit", "x"], "--limit"), (["--seed", "-1"], "--seed"),
    (["--split", "dev"], "dev"), (["--json", "/proc/x/y.json"], "/proc/x"), (["--plots", "/proc/x"], "/proc/x"),
    (["--backbone", "vgg"], "--backbone"), (["--precision", "fp8"], "--precision"),
    (["--text", "loud"], "--text"), (["--", "--lr", "1"], "--tables"),
    (["--dataset", "kvasir", "--data", "tests", "--text", "wrong"], "tests"),
    (["--mean-wordings", "0"], "--mean-wordings"), (["--mean-wordings", "2", "--text", "empty"], "--mean-wordings"),
    (["--attributes-file", "none.json"], "none.json"), (["--tables", "9"], "--tables 9"),
    (["--tables", "none.json"], "none.json")])
def test_bad_flags_are_named(flags, named, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--checkpoint", "sam", "--light", "--prompt", "box", "--image-size",
                                      "64", "--limit", "1", "--cache", "none", *flags])
    with pytest.raises(InputError) as e:
        evaluation.main()
    assert named in str(e.value)


def test_nothing_trained_yet_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(InputError, match="python train.py"):
        evaluation.main()


def test_a_missing_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--checkpoint", str(tmp_path / "missing")])
    with pytest.raises(InputError, match="missing.*train.py"):
        evaluation.main()


class Noise:
    """A predictor that guesses, the same for the same sample; dies after `lives` images."""
    prompt, lives = "none", 10 ** 9

    def prepare(self, sample):
        return sample

    def __call__(self, sample):
        self.lives -= 1
        if self.lives < 0:
            raise KeyboardInterrupt
        rng = torch.Generator().manual_seed(int(sample.masks.sum()))
        names = [*sample.targets, *sample.absent]
        return names, torch.randn(len(names), 16, 16, generator=rng) - 1


def test_a_killed_evaluation_goes_on(tmp_path):
    """Killed again and again, on other numbers of processes, with a torn last line: the same scores."""
    dataset = open_dataset("demo", split="test", image_size=64, limit=9)
    whole = evaluation.evaluate(Noise(), dataset, progress=False)
    assert sorted(set(whole[1]["image"])) == list(range(9)) and len(whole[0]) == 72
    path, asked = tmp_path / "x.json", 0
    for world, rank in ((1, 0), (2, 1), (3, 2), (1, 0)):
        predictor = Noise()
        predictor.lives = 10 ** 9 if asked == 3 else 2
        journal = evaluation.Journal(path, rank, "these settings")
        journal.begin()
        try:  # what evaluate() does on one rank
            for images in evaluation.cases_of(dataset)[rank::world]:
                if images[0] not in journal.cases:
                    journal.add(images[0], evaluation.evaluate_case(predictor, dataset, images))
        except KeyboardInterrupt:
            journal.file.write(f'["{journal.key}", 8, [{{"ro')
        journal.file.close()
        asked += 1
    journal = evaluation.Journal(path, 0, "these settings")
    assert journal.cases.keys() == set(range(9))
    again = evaluation.evaluate(Noise(), dataset, journal, progress=False)
    for scores, expected in zip(again, whole):
        pd.testing.assert_frame_equal(scores, expected)
    assert not evaluation.Journal(path, 0, "other settings").cases
    journal.remove()
    assert not list(tmp_path.glob("*.partial"))


def test_processes_find_the_same_numbers(tmp_path, small):
    """The command with torchrun on two processes, and on one; volumes would be shared out in the same way."""
    from runs import save_checkpoint
    save_checkpoint(small, tmp_path / "last.safetensors", dataset="demo")
    flags = [str(ROOT / "eval.py"), "--checkpoint", str(tmp_path), "--prompt", "none", "--limit", "5",
             "--cache", "none"]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    for name, launch in (("one", ["-W", "ignore"]), ("two", ["-m", "torch.distributed.run", "--standalone",
                                                             "--nproc_per_node", "2"])):
        run = subprocess.run([sys.executable, *launch, *flags, "--json", str(tmp_path / f"{name}.json")], env=env,
                             text=True, capture_output=True)
        assert run.returncode == 0, run.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two and len(one["volumes"]["case"]) == 40 and not list(tmp_path.glob("*.partial"))


def run_eval(monkeypatch, capsys, folder, *flags):
    """eval.py on three demo slices -> what it wrote as JSON, what it printed."""
    monkeypatch.setattr(sys, "argv", ["eval.py", "--checkpoint", str(folder), "--prompt", "box", "--limit", "3",
                                      "--cache", "none", "--json", str(folder / "eval.json"), *map(str, flags)])
    evaluation.main()
    return json.loads((folder / "eval.json").read_text()), capsys.readouterr().out


def test_other_wordings(model, tmp_path, monkeypatch, capsys):
    """--attributes-file evaluates a checkpoint with other words, and --mean-wordings with several of them at once."""
    folder = model[1]
    own, said = run_eval(monkeypatch, capsys, folder)
    assert own["mean_wordings"] is None and own["largest_component"] is False and "wordings" not in said
    texts = json.loads((ROOT / "attributes.json").read_text())
    turned = {name: {kind: split_wordings(words)[1] for kind, words in kinds.items()}
              for name, kinds in texts["synapse"].items()}
    (tmp_path / "other.json").write_text(json.dumps(dict(demo=turned)))
    other, _ = run_eval(monkeypatch, capsys, folder, "--attributes-file", tmp_path / "other.json")
    reworded, _ = run_eval(monkeypatch, capsys, folder, "--text", "reworded")
    assert other["targets"] == reworded["targets"]  # the first of those that training never draws
    assert other["targets"] != own["targets"] and other["attributes_file"] == str(tmp_path / "other.json")
    (tmp_path / "one.json").write_text(json.dumps(dict(demo={
        name: {kind: words[:1] for kind, words in kinds.items()} for name, kinds in texts["synapse"].items()})))
    one, said = run_eval(monkeypatch, capsys, folder, "--mean-wordings", 5, "--attributes-file", tmp_path / "one.json")
    assert one["targets"] == own["targets"] and one["mean_wordings"] == 5
    assert "prompt: box, mean of up to 5 wordings" in said
    several, _ = run_eval(monkeypatch, capsys, folder, "--mean-wordings", 2)
    assert several["targets"] not in (own["targets"], reworded["targets"])
    del turned["liver"]["shape"]
    (tmp_path / "other.json").write_text(json.dumps(dict(demo=turned)))
    with pytest.raises(InputError, match="other.json.*liver.*shape"):
        run_eval(monkeypatch, capsys, folder, "--attributes-file", tmp_path / "other.json")


def test_what_is_left_out_is_as_it_was_trained(small, tmp_path, monkeypatch, capsys):
    """Drawn data: the same numbers as with the flags, which win where they are given."""
    from runs import save_checkpoint
    arguments = dict(dataset="demo", data=None, axes=None, fold=None, overlap=0.0, contrast=None, size=0.5)
    save_checkpoint(small, tmp_path / "last.safetensors", dataset="demo", arguments=arguments)
    remembered, said = run_eval(monkeypatch, capsys, tmp_path)
    assert "as the checkpoint was trained: --overlap 0.0 --size 0.5\n" in said and remembered["size"] == 0.5
    given, said = run_eval(monkeypatch, capsys, tmp_path, "--overlap", 0.0, "--size", 0.5)
    assert given == remembered and "as the checkpoint" not in said
    other, _ = run_eval(monkeypatch, capsys, tmp_path, "--size", 1)
    assert other["targets"] != given["targets"] and (other["size"], other["overlap"]) == (1, 0)


OWN = str(ROOT / "attributes.json")  # a file that is there


@pytest.mark.parametrize("trained, flags, found, said", [
    (dict(dataset="kits19", axes="z"), {}, dict(axes="z"), "as the checkpoint was trained: --axes z"),
    (dict(dataset="kits19", axes="z"), dict(axes="xyz"), dict(axes="xyz"), ""),
    (dict(dataset="kits19", data="HERE"), {}, dict(data="HERE"), "as the checkpoint was trained: --data HERE"),
    (dict(dataset="kits19", data="HERE"), dict(data="other"), dict(data="other"), ""),
    (dict(dataset="kits19", data="/not/here"), {}, {}, ""),  # another machine's
    (dict(dataset="kits19", data="HERE", axes="z"), dict(dataset="kvasir"), {}, ""),  # of other data it says nothing
    (dict(dataset="a,kits19,b", data="/not/here,HERE,/not/here"), dict(dataset="kits19"), dict(data="HERE"), "HERE"),
    (dict(dataset="a,b,kits19", data="HERE,HERE,/not/here"), dict(dataset="kits19"), {}, ""),
    (dict(dataset="a,b,kits19", data=None), dict(dataset="kits19"), {}, ""),
    (dict(dataset="folder", fold=3), {}, dict(fold=3), "as the checkpoint was trained: --fold 3"),
    (dict(dataset="folder", data="HERE", attributes_file=OWN), {}, dict(data="HERE", fold=0, attributes_file=OWN),
     f"--attributes-file {OWN}"),  # the texts go with their data
    (dict(dataset="folder", data="HERE", attributes_file=OWN), dict(data="x"), dict(data="x", fold=0), ""),
    (dict(dataset="folder", data="HERE", attributes_file="no.json"), {}, dict(data="HERE", fold=0), "--data HERE"),
    (dict(dataset="folder", fold=None), {}, dict(fold=0), ""),
    (dict(dataset="folder", fold=0), dict(fold=0), dict(fold=0), ""),
    (dict(dataset="folder", fold=None), dict(fold=1), dict(fold=1), "trained with --fold 0: cases of fold 1 may"),
    (dict(dataset="folder", fold=2), dict(fold=0), dict(fold=0), "trained with --fold 2: cases of fold 0 may"),
    (dict(dataset="folder", fold=2), dict(fold=2), dict(fold=2), ""),
    (dict(dataset="kvasir"), dict(dataset="folder", fold=1), dict(fold=1), ""),
    (dict(dataset="kvasir"), dict(dataset="folder"), dict(fold=0), ""),  # the one that is opened
    ({}, dict(dataset="folder", fold=2), dict(fold=2), ""), ({}, dict(dataset="demo"), {}, "")])
def test_what_a_checkpoint_remembers_of_its_data(trained, flags, found, said, tmp_path):
    there = lambda values: {k: v.replace("HERE", str(tmp_path)) if isinstance(v, str) else v for k, v in values.items()}
    every = dict.fromkeys(("data", "axes", "fold", "overlap", "contrast", "size", "attributes_file"))
    last = trained.get("dataset", "demo").split(",")[-1]
    args = SimpleNamespace(**dict(every, dataset=last) | flags)
    record = dict(dataset=last, step=1) | (dict(arguments=dict(every) | there(trained)) if trained else {})
    lines = evaluation.as_trained(args, record)
    assert vars(args) == dict(every, dataset=args.dataset) | there(found)
    assert len(lines) == bool(said) and said.replace("HERE", str(tmp_path)) in "".join(lines)


class LiverAndCorner(Noise):
    """Finds the liver as it is, and a blob in a corner that is none."""
    def __call__(self, sample):
        livers = (m for m, name in zip(sample.truth, sample.targets) if name == "liver")
        mask = sum(livers, np.zeros(sample.size, bool))
        mask[:3, :3] = True
        return ["liver"], torch.from_numpy(mask)[None] * 2.0 - 1


def test_the_largest_component_of_a_volume(monkeypatch):
    """What else was found is gone from the scores of the volume and from those of its slices."""
    dataset = open_dataset("demo", split="test", image_size=64, limit=4)
    monkeypatch.setattr(dataset, "case", lambda i: "one volume")
    prediction, truth = (np.stack(x) for x in zip(*(
        evaluation.label_maps(LiverAndCorner(), sample, dataset.classes) for sample in dataset)))
    largest = evaluation.largest_components(prediction)
    liver = dataset.classes.index("liver") + 1
    first_liver = lambda scores: scores[scores["target"] == "liver"]["dice_strict"].iloc[0]
    assert largest.any() and not largest[:, :3, :3].any() and (prediction[:, :3, :3] == liver).all()
    for switch, found in ((False, prediction), (True, largest)):
        volumes, targets = evaluation.evaluate(LiverAndCorner(), dataset, progress=False, largest_component=switch)
        assert first_liver(volumes) == evaluation.dice(found == liver, truth == liver)
        z = next(z for z in range(4) if (truth[z] == liver).any())
        assert first_liver(targets) == evaluation.dice(found[z] == liver, truth[z] == liver)


class Exact(Noise):
    """Finds all that is there, on the samples' own grid."""
    def __call__(self, sample):
        return list(sample.targets), torch.from_numpy(np.array(sample.truth, bool).reshape(-1, *sample.size)) * 2.0 - 1


def test_a_slice_of_which_nothing_is_known_cuts_no_organ(monkeypatch):
    """A slice labelled "ignore" has neither targets nor absent structures; the largest part reaches over it."""
    dataset = open_dataset("demo", split="test", image_size=64, limit=1)
    sample = dataset[0]
    nothing = replace(sample, targets=(), absent=(), masks=sample.masks[:0], truth=sample.truth[:0])
    slices = [sample] * 5 + [nothing] + [sample] * 4

    class Volume(list):
        volumes, classes, source = True, dataset.classes, SimpleNamespace(spacing=lambda case: None)

    for switch in (False, True):
        rows = evaluation.evaluate_case(Exact(), Volume(slices), range(10), largest_component=switch)
        whole = [row["dice_strict"] for row in rows if row["volume"] and row["target"] in sample.targets]
        assert len(whole) == len(set(sample.targets)) and min(whole) > 0.99  # a few pixels lie apart


def test_another_data_set_of_the_same_name_is_evaluated_anew(small, tmp_path, monkeypatch, capsys):
    """What a killed evaluation has found is of its own settings of the data alone."""
    from runs import save_checkpoint
    save_checkpoint(small, tmp_path / "last.safetensors", dataset="demo")
    kept = []
    monkeypatch.setattr(evaluation.Journal, "remove", lambda self: kept.append(self))
    for size in (1, 0.5, 1):
        result, _ = run_eval(monkeypatch, capsys, tmp_path, "--limit", 2, "--size", size)
        assert result["size"] == size
    assert len({journal.key for journal in kept}) == 2 and kept[0].key == kept[2].key != kept[1].key


def test_what_was_asked_otherwise_is_not_gone_on_with(tmp_path, monkeypatch):
    """Other texts in the same file, or another normalisation of the images: other settings of a killed evaluation."""
    keys = []

    def stop(predictor, dataset, journal, *rest, **more):
        keys.append(journal.key)
        raise InputError("enough")

    monkeypatch.setattr(evaluation, "evaluate", stop)
    texts = json.loads((ROOT / "attributes.json").read_text())["synapse"]
    for words, flags in ((texts, []), (texts, []), (texts | {"liver": texts["spleen"]}, []), (texts, ["--normalize", "sam"])):
        (tmp_path / "a.json").write_text(json.dumps(dict(demo=words)))
        monkeypatch.setattr(sys, "argv", ["eval.py", "--checkpoint", "sam", "--light", "--prompt", "box", "--image-size",
                                          "64", "--limit", "1", "--cache", "none", "--attributes-file",
                                          str(tmp_path / "a.json"), *flags])
        with pytest.raises(InputError, match="enough"):
            evaluation.main()
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_largest_component_is_for_volumes_and_is_named(small, tmp_path, monkeypatch, capsys, linked):
    from runs import save_checkpoint
    save_checkpoint(small, tmp_path / "last.safetensors", dataset="demo")
    result, said = run_eval(monkeypatch, capsys, tmp_path, "--largest-component")
    assert result["largest_component"] is True and "prompt: box, largest component" in said
    with pytest.raises(InputError, match="--largest-component: kvasir has no volumes"):
        run_eval(monkeypatch, capsys, tmp_path, "--largest-component", "--dataset", "kvasir", "--data",
                 linked("kvasir"))


def test_pictures(tmp_path, small, monkeypatch, capsys):
    """Best, median and worst case by rule; the scores name the rows."""
    from runs import save_checkpoint
    save_checkpoint(small, tmp_path / "last.safetensors", dataset="demo")
    monkeypatch.setattr(sys, "argv", ["eval.py", "--checkpoint", str(tmp_path), "--prompt", "box", "--limit", "3",
                                      "--cache", "none", "--plots", str(tmp_path / "p")])
    evaluation.main()
    picture = Image.open(tmp_path / "p/demo-box.png")
    assert picture.size[0] > 700 and "strict Dice" in capsys.readouterr().out
    scores = evaluation.score_table([dict(image=i, volume=True, case=f"c{i}", target="liver", modality="ct",
                                          dice_strict=dice) for i, dice in enumerate((0.2, 0.9, None, 0.5))])
    assert evaluation.typical(scores) == {"best case": 1, "median case": 3, "worst case": 0}
    assert evaluation.typical(scores[3:]) == {"best case": 3} and evaluation.typical(scores[:0]) == {}

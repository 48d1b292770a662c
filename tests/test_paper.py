"""The paper's tables and figures: rows, numbers, resuming, and what is wrong with the files."""
import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import linregress

from common import InputError, locked
from conftest import ROOT, fails
from medsegr import Config
from paper import ablations, figures, tables
from readers.synapse import ORGANS, TEST_CASES


# ---------------------------------------------------------------------------------------------------------------------
# Rows

def config_of(flags):
    """Flags of train.py -> the Config that they mean."""
    values, name = {}, None
    for part in flags:
        if part.startswith("--no-"):
            values[part[5:]] = False
        elif part == "--sentence":
            values["sentence"] = True
        elif part.startswith("--"):
            name = part[2:]
            values[name] = ()
        else:
            values[name] += (part,)
    return Config(**values)


def test_rows_are_the_papers():
    for table, rows in tables.NUMBERS["tables"].items():
        assert list(rows["rows"]) == list(ablations.TABLES[table]), table
    for table, rows in ablations.TABLES.items():
        if table != "figure6":
            configs = {row: config_of(flags) for row, flags in rows.items()}
            assert configs[list(rows)[-1]] == Config(), table  # the last one is the full model
            if table != "baselines":
                assert len({repr(c) for c in configs.values()}) == len(rows)
    assert config_of(ablations.TABLES["3"]["position+shape"]).attributes == ("position", "shape")
    assert config_of(ablations.TABLES["3"]["position+shape"]).active_priors == ("position", "shape")
    assert config_of(ablations.TABLES["4"]["none"]).active_branches == ("sem", "sam")
    assert config_of(ablations.TABLES["5"]["none"]).active_branches == ("sam",)
    folders = {ablations.folder_name(flags) for rows in ablations.TABLES.values() for flags in rows.values()}
    assert len(folders) == len({flags for rows in ablations.TABLES.values() for flags in rows.values()})


def test_the_papers_numbers_agree_with_each_other():
    """Its own averages, as a check of the data file: table 1's are means of the modalities, table 2's of the organs
    (AutoSAM's and TransUnet's are not, in the paper itself)."""
    for prompt in ("point", "box"):
        for name, values in tables.NUMBERS["table1"][prompt].items():
            assert np.mean(values[:-1]) == pytest.approx(values[-1], abs=0.08), (prompt, name)
    for name, values in tables.NUMBERS["table2"]["rows"].items():
        if name != "AutoSAM":
            assert np.mean(values[:8]) == pytest.approx(values[8], abs=0.3), name
    full = {tuple(rows["rows"][list(rows["rows"])[-1]]) for rows in tables.NUMBERS["tables"].values()}
    assert full == {(88.23, 87.69)}


def test_slopes_and_their_intervals():
    """The slope is scipy's; cases that agree leave no doubt, and doubt grows where a case is one of few."""
    rng = np.random.default_rng(0)
    def table(cases, noise):
        x = rng.random(300)
        case = rng.integers(0, cases, 300)
        return pd.DataFrame(dict(overlap=x, dice_strict=0.9 - 0.3 * x + noise * rng.normal(size=cases)[case] * x,
                                 case=case.astype(str)))
    exact = table(10, 0)
    assert figures.slope(exact, "overlap") == "-0.300 (-0.300 to -0.300)"
    widths = []
    for cases in (6, 100):
        noisy = table(cases, 0.2)
        middle, low, high = (float(part) for part in re.findall(r"-?\d\.\d+", figures.slope(noisy, "overlap")))
        assert middle == pytest.approx(linregress(noisy["overlap"], noisy["dice_strict"]).slope, abs=6e-4)
        assert low < middle < high
        widths.append(high - low)
    assert widths[0] > 1.3 * widths[1]
    assert figures.slope(exact[exact["case"] < "2"], "overlap") == "-"


@pytest.fixture
def fake(monkeypatch):
    """Rows that cost nothing: train.py and eval.py write what they were asked; `broken` rows fail."""
    calls, broken = [], set()

    def run(command, stdout, stderr):
        script, flags = command[1].name, command[2:]
        calls.append((script, flags))
        out = flags[flags.index("--out") + 1] if "--out" in flags else None
        if broken & set(flags):
            stdout.write(b"train.py: --lr 7: give less\n")
            return type("Done", (), dict(returncode=2))
        if script == "eval.py":
            from pathlib import Path
            dice = 0.5 + 0.1 * ("full" in flags[flags.index("--json") + 1]) + 0.01 * len(calls)
            Path(flags[flags.index("--json") + 1]).write_text(json.dumps(dict(
                dataset="demo", split="test", prompt="none", table=dict(mean=dict(dice_strict=dice)))))
        return type("Done", (), dict(returncode=0, out=out))

    monkeypatch.setattr(ablations.subprocess, "run", run)
    return calls, broken


def test_tables_row_by_row(fake, tmp_path, capsys):
    calls, broken = fake
    rows = tmp_path / "mine.json"
    rows.write_text(json.dumps({"slow": ["--lr", "1"], "broken": ["--lr", "7"], "full": []}))
    make = lambda *tables, train=("--max-steps", "1"): ablations.run_tables(
        tables, [0, 1], tmp_path / "out", ["--dataset", "demo"], ["--split", "test"], list(train))
    broken.add("7")
    fails(lambda: make(str(rows)), "--lr 7: give less", "output.txt")
    assert [c[0] for c in calls] == ["train.py", "eval.py", "train.py"]
    broken.clear()
    make(str(rows), "5")  # the rest, and table 5, whose last row is known from the other table
    trained = [flags for script, flags in calls[3:] if script == "train.py"]
    assert len(trained) == 2 * (3 + 4) - 1 and all("--resume" in flags for flags in trained)
    assert trained[0][-1] == "--resume" and trained[0][:4] == ["--dataset", "demo", "--max-steps", "1"]
    before = len(calls)
    make(str(rows), "5")
    assert len(calls) == before  # nothing is left to do
    numbers = json.loads((tmp_path / "out/tables.json").read_text())
    assert {len(v) for rows in numbers.values() for v in rows.values()} == {2} and len(numbers["5"]) == 5
    text = (tmp_path / "out/tables.md").read_text()
    full = 100 * np.mean(numbers["5"]["cognitive+perceptual+caa"])
    assert f"| cognitive+perceptual+caa | {full:.2f} |" in text and "| +0.00 | - | 88.23 | 87.69 | +0.00 | +0.00 |" in text
    assert text in capsys.readouterr().out
    fails(lambda: make("5", train=("--max-steps", "2")), "settings.json", "--out")


def test_a_row_is_made_by_one_process(fake, tmp_path, capsys):
    calls, _ = fake
    (tmp_path / "full/seed0").mkdir(parents=True)
    with locked(tmp_path / "full/seed0/lock"):
        ablations.run_tables(["5"], [0], tmp_path, [], [], [])
    assert len(calls) == 2 * 4 and "other processes" in capsys.readouterr().out
    ablations.run_tables(["5"], [0], tmp_path, [], [], [])
    assert len(calls) == 2 * 5


def strict(dice):
    """{(case, target): strict Dice} -> what of eval.py's JSON the tables read, of images; NaN as None."""
    rows = [dict(case=case, target=target, image=case, dice_strict=None if np.isnan(v) else v)
            for (case, target), v in dice.items()]
    return dict(volumes=None, targets={key: [row[key] for row in rows] for key in rows[0]})


def test_intervals_are_paired_over_cases():
    """Cases that differ much, but by the same in both rows: a paired interval sees it, and agrees with draws by hand."""
    rng = np.random.default_rng(0)
    cases = [f"{n}" for n in range(12)]
    base = {(case, target): rng.random() * 0.6 for case in cases for target in ("a", "b") if rng.random() < 0.9}
    full = {seed: strict({k: v + 0.2 for k, v in base.items()}) for seed in (0, 1)}
    low, high = ablations.interval({0: strict(base), 2: strict(base)}, full)
    assert low == pytest.approx(-0.2) and high == pytest.approx(-0.2)
    noisy = {k: v + rng.normal(0, 0.1) for k, v in base.items()}
    low, high = ablations.interval({1: strict(noisy)}, {1: strict(base)})
    draws = []
    for _ in range(4000):
        drawn = rng.choice(cases, len(cases))
        values = {t: [noisy[c, t] - base[c, t] for c in drawn if (c, t) in base] for t in ("a", "b")}
        draws.append(np.mean([np.mean(v) for v in values.values()]))
    assert np.allclose((low, high), np.quantile(draws, (0.025, 0.975)), atol=0.006)
    missing = base | {("0", "a"): float("nan")}
    assert ablations.interval({0: strict(missing)}, {0: strict(base)}) == (0, 0)
    assert ablations.interval({0: strict(base)}, {1: strict(base)}) is None  # no seed in common
    one = {("0", "a"): 0.5}
    assert ablations.interval({0: strict(one)}, {0: strict(one)}) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a": 1}', '{"a": [1]}'])
def test_bad_rows_are_named(content, tmp_path):
    (tmp_path / "rows.json").write_text(content)
    fails(lambda: ablations.read_rows([str(tmp_path / "rows.json")]), "rows.json", "--lr")


@pytest.mark.parametrize("flags", [["--seed", "3"], ["--out=x"]])
def test_what_every_row_has_of_its_own_is_refused(flags, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"mine": flags}))
    fails(lambda: ablations.run_tables([str(tmp_path / "rows.json")], [0], tmp_path, [], [], []), flags[0], "--seeds")
    fails(lambda: ablations.run_tables(["5"], [0], tmp_path, [], [], flags), flags[0], "--seeds")


def test_a_real_row(tmp_path):
    """One step of training and three images, through the scripts themselves."""
    ablations.run_tables(["baselines"], [0], tmp_path, ["--dataset", "demo", "--cache", "none"], ["--limit", "3"],
                         ["--light", "--image-size", "64", "--feature-grid", "8", "--limit", "2", "--max-steps", "1",
                          "--val-slices", "1", "--batch-size", "2", "--workers", "0"])
    numbers = json.loads((tmp_path / "tables.json").read_text())["baselines"]
    assert all(len(v) == 1 and 0 <= v[0] <= 1 for v in numbers.values()) and len(numbers) == 3
    assert not list(tmp_path.glob("*/*/training.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures from evaluations

def test_rows_are_compared_over_the_seeds_that_both_have():
    of = lambda **seeds: {int(s[1:]): dict(table=dict(mean=dict(dice_strict=v))) for s, v in seeds.items()}
    assert ablations.mean_difference(of(s0=0.5), of(s0=0.6, s1=0.2)) == pytest.approx(-0.1)
    assert ablations.mean_difference(of(s0=0.5, s1=0.3, s2=0.9), of(s0=0.6, s1=0.2)) == pytest.approx(0.0)
    assert np.isnan(ablations.mean_difference(of(s2=0.5), of(s0=0.6)))
    assert np.isnan(ablations.mean_difference(of(s0=None), of(s0=0.6)))


def evaluation(path, rows, table=None, **about):
    """Writes what eval.py --json writes; rows: (image, case, class, modality, Dice, area, overlap)."""
    names = ("image", "case", "target", "modality", "dice_strict", "area", "overlap")
    columns = {name: list(values) for name, values in zip(names, zip(*rows))}
    about = dict(dataset="sa-med2d", split="test", prompt="box", points=1, images=len(set(columns["image"]))) | about
    volumes = about.pop("volumes", None)
    path.write_text(json.dumps(about | dict(table=table or dict(mean=dict(dice_strict=0.5)), targets=columns,
                                            volumes=volumes)))
    return f"{path.stem}={path}"


@pytest.fixture
def crowded(tmp_path):
    """400 targets, two in an image, whose Dice falls by 0.3 from no overlap to full overlap."""
    rng, rows = np.random.default_rng(0), []
    for i in range(200):
        for target in ("a", "b"):
            rate = float(rng.random())
            area = 0.01 if target == "a" else 0.2
            rows.append((f"i{i}", f"c{i}", target, ("ct", "mr")[i % 2], 0.9 - 0.3 * rate, area, rate))
    rows += [("alone", "c", "a", "pet", 0.1, 0.3, 0.0), ("gone", "c", "a", "pet", None, 0.0, 0.0)]
    return [evaluation(tmp_path / f"{name}.json", rows, prompt=prompt) for name, prompt in
            (("ours", "box"), ("sam", "box"), ("more", "point"))]


def test_table_1(crowded):
    text = tables.table1(tables.read_evaluations(crowded))
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ours |")]
    ct, mr, pet = (float(rows[0][i]) for i in (1, 2, 3))
    assert 70 < ct < 80 and 70 < mr < 80 and pet == 10 and rows[0][4] == "-"  # an absent target is no target
    assert float(rows[0][9].rstrip(" |")) == pytest.approx((ct + mr + pet) / 3, abs=0.02)
    assert "paper: MedSeg-R* | 86.61" in text and "paper: MedSeg-R* | 80.32" in text and "other data" in text
    assert f"{ct - 86.61:+.2f}" in text


def test_table_2(tmp_path):
    table = {name: dict(dice=0.5, dice_strict=0.4) for name in ORGANS}
    table["mean"] = dict(dice=0.5, dice_strict=0.4, hd95=10.0, hd95_strict=20.0)
    rows = [("i", "c", "liver", "ct", 0.5, 0.1, 0.0)]
    volumes = lambda cases: dict(case=[c for c in cases], target=["liver"] * len(cases), dice_strict=[0.5] * len(cases))
    own = [f"case{n}" for n in TEST_CASES]
    same = evaluation(tmp_path / "same.json", rows, table, dataset="synapse", prompt="none", volumes=volumes(own))
    other = evaluation(tmp_path / "other.json", rows, table, dataset="synapse", prompt="none", volumes=volumes(own[:3]))
    text = tables.table2(tables.read_evaluations([same]))
    assert "paper: MedSeg-R | 93.49" in text and "other data" not in text and "12 volumes" in text
    assert "| 50.00 | 10.00 |" in text and "| 40.00 | 20.00 |" in text and "-36.71 | +3.87" in text
    assert "paper: MedSeg-R* | 93.49" in tables.table2(tables.read_evaluations([other]))
    kvasir = evaluation(tmp_path / "k.json", rows, dataset="kvasir")
    fails(lambda: tables.table2(tables.read_evaluations([kvasir])), "kvasir", "Synapse")


def test_figures(crowded, tmp_path):
    """The line through the points, the small objects, and pictures that are not blank."""
    text = figures.figure3(tables.read_evaluations(crowded), tmp_path / "3.png")
    assert "| ours, box | -1.00 | -0.300 (-0.300 to -0.300) | 400 |" in text and "paper: MedSeg-R*, box | -0.36 | -0.12" in text
    boxes = figures.figure4(tables.read_evaluations(crowded[:2]), tmp_path / "4.png")
    assert "| a, ours, box | 201 |" in boxes
    ablated = tmp_path / "tables.json"
    ablated.write_text(json.dumps(dict(figure6={"1/16": [0.3, 0.4], "1/1": [0.6], "1/2": []})))
    points = figures.figure6(tables.read_evaluations(crowded[2:]), tmp_path / "6.png", ablated)
    assert "| 1/16 of the training data | 35.00 | ± 7.07, seeds: 2 | 78.19 |" in points and "more, points: 1" in points
    for name in ("3", "4", "6"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert pixels.shape[1] > 400 and 0.005 < (pixels < 128).mean() < 0.5
    fails(lambda: figures.figure6([], tmp_path / "6.png", None), "--tables")
    fails(lambda: figures.figure6([], tmp_path / "6.png", tmp_path / "none.json"), "none.json")


def test_an_evaluation_without_a_structure_has_no_numbers(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(dict(
        dataset="demo", split="test", prompt="box", points=1, images=1, table=dict(mean=dict(dice_strict=None)),
        volumes=None, targets=dict(image=[], case=[], target=[], modality=[]))))
    evaluations = tables.read_evaluations([f"x={path}"])
    assert "| x | - |" in tables.table1(evaluations)
    assert "| x, box | - | - | 0 | - | - | 0 |" in figures.figure3(evaluations, tmp_path / "3.png")
    fails(lambda: figures.figure4(evaluations, tmp_path / "4.png"), "no evaluation to draw")


def test_a_label_has_one_evaluation_of_a_prompt(tmp_path):
    rows = [("i", "c", "liver", "ct", 0.5, 0.1, 0.0)]
    one, three = (evaluation(tmp_path / f"{n}.json", rows, prompt="point", points=n).split("=")[1] for n in (1, 3))
    fails(lambda: tables.read_evaluations([f"x={one}", f"x={three}"]), three, "label of its own")
    assert len(tables.read_evaluations([f"x={one}", f"x={three}"], several_points=True)) == 2
    fails(lambda: tables.read_evaluations([f"x={one}", f"x={one}"], several_points=True), one, "label of its own")


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"table": {"mean": 1}}'])
def test_a_file_that_is_no_evaluation_is_named(content, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["tables.py", "table1", f"ours={tmp_path / 'x.json'}"])
    fails(tables.main, "x.json")


def test_flags_of_paper(tmp_path, monkeypatch, crowded, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", "table1", *crowded, "--out", str(tmp_path / "t/1.md")])
    tables.main()
    assert (tmp_path / "t/1.md").read_text() in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tables.py", "table1", "x.json"])
    fails(tables.main, "x.json", "LABEL=FILE")
    with pytest.raises(InputError):
        monkeypatch.setattr(sys, "argv", ["tables.py", "table9"])
        tables.main()
    assert (ROOT / "paper/paper.json").is_file()


def test_a_line_needs_three_points():
    line = figures.line_through(np.array([0, 1, 2]), np.array([5, 3, 1]))
    assert (line.rvalue, line.slope, line.intercept) == pytest.approx((-1, -2, 5))
    for x, y in ([0, 1], [0, 1]), ([], []), ([0.1] * 7, range(7)):
        assert figures.line_through(np.array(x), np.array(y)) is None

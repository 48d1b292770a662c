"""readers/dicom.py on random series, random damage: right on its own grid, or one line. EXAMPLES=1000 tries more."""
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pydicom
import pytest

from common import InputError
from conftest import fails
from readers.dicom import read_dicom
from test_dicom import HU, WIDE, check, decimals, rotation, save, series, world

pytest.importorskip("hypothesis", reason="see requirements-extras.txt")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # as readers/dicom.py itself has it
MANY = settings(max_examples=int(os.environ.get("EXAMPLES", 100)), deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck), phases=[Phase.generate])
ANGLE = st.floats(-3.1, 3.1)
NAMES = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "RescaleSlope",
         "RescaleIntercept", "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "BitsAllocated", "BitsStored",
         "HighBit", "PixelRepresentation", "PhotometricInterpretation", "PixelPaddingValue", "PixelPaddingRangeLimit",
         "Modality",
         "SeriesNumber", "SeriesInstanceUID", "PixelData", "SpacingBetweenSlices", "PlanarConfiguration",
         "ModalityLUTSequence", "PerFrameFunctionalGroupsSequence")
ODD = st.sampled_from([..., b"", b"nan ", b"inf ", b"0 ", b"1 ", b"-1", b"1\\2 ", b"1\\0\\0\\0\\1\\0 ", b"0\\0\\nan",
                       b"1e999 ", b"abc ", b"\0\0", b"\1\0", b"\3\0", b"\xff\xff", b"\7\0\7\0", b"MONOCHROME1 ",
                       b"RGB ", b"CT"]) | st.binary(max_size=12).map(lambda x: x + b" " * (len(x) % 2))


@given(st.data())
@MANY
def test_slices_that_lie_anyhow(data):
    """Random obliques and tilts, files in any order: each voxel lies where its file says, and its value is right."""
    draw = lambda strategy: data.draw(strategy)
    turn = rotation([draw(ANGLE) for _ in range(3)])
    gap, lean = draw(st.floats(0.2, 20)), [draw(st.floats(-0.5, 0.5)) for _ in range(2)]
    step = turn @ [lean[0] * gap, lean[1] * gap, gap * draw(st.sampled_from([1, -1]))]
    spacing, start = [draw(st.floats(0.1, 5)) for _ in range(2)], [draw(st.floats(-500, 500)) for _ in range(3)]
    count = draw(st.integers(2, 6))
    order = draw(st.permutations(range(count)))
    fault = draw(st.sampled_from(["none", "none", "missing", "doubled", "shifted", "beside"]))
    where, axis = draw(st.integers(1, 4)), 2 if fault == "shifted" else draw(st.integers(0, 1))
    by = turn[:, axis] * draw(st.floats(0.3, 50))
    if fault != "none":
        count, order = 6, draw(st.permutations(range(6)))
    position = lambda z: decimals(np.array(start) + z * step + by * (fault in ("shifted", "beside") and z == where))
    with tempfile.TemporaryDirectory() as folder:
        folder = series(Path(folder), HU[:count], turn, spacing=spacing, order=order, ImagePositionPatient=position)
        if fault == "missing":
            (folder / f"{order.index(where):03d}.dcm").unlink()
        if fault == "doubled":
            shutil.copy(folder / f"{order.index(where):03d}.dcm", folder / "again.dcm")
        if fault == "none":
            check(folder)
        else:
            fails(lambda: read_dicom(folder, WIDE, "ct"), folder)


@given(st.lists(st.tuples(st.integers(-1, 3), st.sampled_from(NAMES), ODD), max_size=3), st.integers(0, 5),
       st.integers(0, 3), st.floats(0, 0.999), st.integers(0, 255), st.sampled_from(["ct", "mr"]),
       st.sampled_from([None, WIDE]))
@MANY
def test_any_attribute_may_be_odd(edits, cut, which, where, byte, modality, window):
    """Attributes of a slice, or of all, are missing, empty, too many, no numbers; files are cut off or changed: one
    line, or every voxel where pydicom, too, says that it lies."""
    with tempfile.TemporaryDirectory() as folder:
        folder = series(Path(folder), HU[:4])
        for file in folder.iterdir():
            odd = {name: value for z, name, value in edits if z in (-1, int(file.stem))}
            save(pydicom.dcmread(file), file, **odd)
        if cut < 2:
            file = folder / f"{which:03d}.dcm"
            content = bytearray(file.read_bytes())
            if cut:
                content = content[:int(where * len(content))]
            else:
                content[132 + int(where * (len(content) - 132))] = byte
            file.write_bytes(content)
        try:
            volume, grid, _ = read_dicom(folder, window, modality)
        except InputError as e:
            assert "\n" not in str(e) and str(folder) in str(e)
            return
        places = [world(pydicom.dcmread(file), 0, 0) for file in sorted(folder.iterdir())]
        index = (np.linalg.inv(grid.affine) @ np.c_[places, np.ones(len(places))].T)[:3]
        assert np.allclose(index[:2], 0, atol=0.2) and np.array_equal(sorted(np.rint(index[2])), range(len(places)))
        assert volume.shape == grid.shape and volume.size == HU[:4].size

"""A label map, back to where its DICOM series came from: a DICOM Segmentation object, written by the package highdicom.

Each frame is the mask of one segment on one source slice, which it names. Frames without a pixel are left out, unless
all are. A segment is coded where DICOM knows a structure of its name, else it carries the name alone.
"""
import hashlib
import io
import logging
import re
import warnings

import numpy as np
from pydicom import Dataset, uid
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.valuerep import format_number_as_ds

from common import InputError
from readers.dicom import load, text
from readers.volumes import along_file

NAMED = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPClassUID", "SOPInstanceUID")
PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
           "StudyTime", "ReferringPhysicianName")  # may be empty
ANATOMY = {code.meaning.lower(): code for code in (getattr(codes.cid7192, name) for name in codes.cid7192.dir())}
SIDES = {"left": codes.SCT.Left, "right": codes.SCT.Right}
logging.getLogger("highdicom").setLevel(logging.ERROR)  # it warns of empty labels
REMEDY = "correct it, or leave --dicom-seg out"


# ---------------------------------------------------------------------------------------------------------------------
# Segments

def code_of(name):
    """A segment's name -> Codes of its category, its type and its side, or None: those of SNOMED CT where the name, or
    the name behind `left` or `right`, is one of DICOM's anatomical structures (part 16, CID 7192); else one of ours."""
    side, _, rest = name.lower().partition(" ")
    if name.lower() in ANATOMY:
        return codes.SCT.AnatomicalStructure, ANATOMY[name.lower()], None
    if side in SIDES and rest in ANATOMY:
        return codes.SCT.AnatomicalStructure, ANATOMY[rest], SIDES[side]
    own = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()  # private schemes begin with 99
    return codes.SCT.SpatialAndRelationalConcept, Code(own, "99MEDSEGR", label_of(name)), None


def label_of(name):
    """As much of a name as DICOM's LO takes: 64 characters, none of which controls anything."""
    return re.sub(r"[\\\x00-\x1f\x7f]", " ", name)[:64].strip() or "segment"


def describe(number, name, version):
    """-> highdicom's SegmentDescription; version: of the algorithm."""
    import highdicom
    category, kind, side = code_of(name)
    algorithm = highdicom.AlgorithmIdentificationSequence("MedSeg-R", codes.DCM.ArtificialIntelligence, version)
    segment = highdicom.seg.SegmentDescription(number, label_of(name), category, kind, "AUTOMATIC", algorithm)
    if side:
        segment.SegmentedPropertyTypeModifierCodeSequence = [highdicom.sr.CodedConcept.from_code(side)]
    return segment


# ---------------------------------------------------------------------------------------------------------------------
# Source slices

def decimals(values):
    """Numbers as DICOM's DS has them, in up to 16 characters."""
    return [format_number_as_ds(float(value)) for value in values]


def sequence(**attributes):
    """[a Dataset of these attributes]"""
    item = Dataset()
    for name, value in attributes.items():
        setattr(item, name, value)
    return [item]


def read_sources(grid):
    """-> the headers of a series' files, in the order of its slices, or of the one file of all frames, with the places
    that readers/dicom.py has checked where highdicom looks for them. InputError if one lacks what is to be named."""
    heads = {s.path: load(s.path, stop_before_pixels=True) for s in grid.slices}
    if len(heads) not in (1, len(grid.slices)):
        raise InputError(f"{grid.path}: its slices lie in several files of many frames, but a segmentation names one "
                         "such file; leave --dicom-seg out")
    first, one = grid.slices[0], heads[grid.slices[0].path]
    turn, spacing = decimals(first.orientation), decimals(first.spacing)
    thickness, = decimals([abs(first.thickness or 0) or np.linalg.norm(grid.affine[:3, 2])])
    seen = set()
    for s in {s.path: s for s in grid.slices}.values():
        head = heads[s.path]
        for name in NAMED:
            if not text(head, name):
                raise InputError(f"{s.path}: has no {name}, which a segmentation has to name; {REMEDY}")
        if text(head, "SOPInstanceUID") in seen:
            raise InputError(f"{s.path}: another slice has its SOPInstanceUID; {REMEDY}")
        seen.add(text(head, "SOPInstanceUID"))
        head.ImagePositionPatient, head.ImageOrientationPatient = decimals(s.position), turn
        head.PixelSpacing, head.SliceThickness = spacing, thickness
        head.pop("SpacingBetweenSlices", None)  # some writers mean the gap, and highdicom measures it
    if len(heads) == 1:
        one.SharedFunctionalGroupsSequence = sequence(
            PlaneOrientationSequence=sequence(ImageOrientationPatient=turn),
            PixelMeasuresSequence=sequence(PixelSpacing=spacing, SliceThickness=thickness))
        one.PerFrameFunctionalGroupsSequence = [
            sequence(PlanePositionSequence=sequence(ImagePositionPatient=decimals(s.position)))[0]
            for s in sorted(grid.slices, key=lambda s: s.frame)]
    return list(heads.values())


# ---------------------------------------------------------------------------------------------------------------------
# The object

def encode_dicom_seg(label, grid, names, version):
    """uint8 [D,H,W], upright: 0, or n of names[n-1] -> the bytes of a DICOM Segmentation of the series of `grid`.
    InputError where highdicom is not installed, or refuses what the series says of itself."""
    try:
        import highdicom
    except ImportError:
        raise InputError("--dicom-seg: needs the package highdicom; pip install highdicom") from None
    heads, masks = read_sources(grid), along_file(label, grid).transpose(2, 1, 0)
    if len(heads) == 1:  # as the file has its frames
        masks = masks[np.argsort([s.frame for s in grid.slices])]
    out = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patient = [heads[0][name] for name in PATIENT if name in heads[0]]
            for name in PATIENT:  # highdicom wants all of them, and none that breaks a rule, as a sex of "U" does
                heads[0].pop(name, None)
                setattr(heads[0], name, "")
            seg = highdicom.seg.Segmentation(
                heads, np.ascontiguousarray(masks), "BINARY",
                [describe(number, name, version) for number, name in enumerate(names, 1)], uid.generate_uid(), 1000,
                uid.generate_uid(), 1, manufacturer="MedSeg-R", manufacturer_model_name="MedSeg-R",
                software_versions=version, device_serial_number="none", content_label="MEDSEG_R",
                series_description="MedSeg-R", specific_character_set="ISO_IR 192")
            for element in patient:  # as the source has them, which files are matched by
                seg.add(element)
            seg.save_as(out)
    except Exception as e:  # highdicom and pydicom raise many things at attributes that DICOM does not allow
        raise InputError(f"{grid.path}: its attributes make no DICOM segmentation ({' '.join(str(e).split())[:150]}); "
                         f"{REMEDY}") from None
    return out.getvalue()


def check_dicom_seg(grid, names):
    """InputError for what encode_dicom_seg would refuse, before there is a label."""
    label = np.zeros(grid.shape, np.uint8)
    label[0, 0, 0] = 1
    encode_dicom_seg(label, grid, names, "")

"""The data sets, as their owners publish them: a file each, whose class lists the images and reads one at a time.

    synapse, kits19, kvasir, sa_med2d, demo     the data sets
    folder                                      one's own
    pictures                                    what they share: the RawSample, splits, picture files
    volumes, dicom, dicom_seg                   NIfTI, both ways; DICOM; label maps as DICOM
    prepare, check                              data.py prepare, data.py stats

Files are all that is known here: nothing of texts, prompts or the model. The classes have the same few names, so that
data.py can treat them alike:

    name, classes       of the data set; classes is a tuple of names
    pairs               (class, modality), as they occur: the texts that are needed
    volumes             True: the images of a case are the slices of one volume, in order, and are scored together
    len(source)         images of the split
    source.key(i)       the name of image i, unique in the data set
    source.case(i)      the patient or volume that it belongs to
    source.spacing(case)    of volumes: (z, y, x), the mm between voxels; None where nobody knows
    source.file(i)      the Path of the file that holds image i; not of drawn ones
    source.read(i)      the RawSample; InputError, in one line that names the file, for anything wrong with it

Nothing is ever unpickled.
"""
from common import InputError


class Listed:
    """What classes share that list their images in `items`, (case, ...) each, and keep the volume of one case open."""
    opened = None

    def __len__(self):
        return len(self.items)

    def case(self, i):
        return self.items[i][0]

    def __getstate__(self):
        return {**self.__dict__, "opened": None}  # every process opens its own


def check_spacing(mm, case, path, remedy):
    """The mm between a case's voxels, as the JSON file at `path` has them; InputError unless they are three."""
    numbers = isinstance(mm, list) and len(mm) == 3 and all(isinstance(n, (int, float)) for n in mm)
    if not (numbers and all(0 < n < 1000 for n in mm)):
        raise InputError(f"{path}: {case} has the spacing {mm}, which are no three numbers of mm; {remedy}")
    return mm

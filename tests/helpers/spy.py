"""Who of a study is looked at: a spy on data sets."""

from contextlib import contextmanager

from steph.data.dataset import Dataset


@contextmanager
def spied(monkeypatch, *names):
    """The patients who are asked for inside the block, in order, as (data set, patient). names: of the methods of
    `Dataset` that are watched; none takes all that look at patients."""
    looked_at = []
    with monkeypatch.context() as patch:
        for name in names or ("pieces", "labels", "slides", "n_patches", "check_coords"):
            original = getattr(Dataset, name)

            def watched(self, patients, *args, original=original, **options):
                named = [patients] if isinstance(patients, str) else patients
                looked_at.extend((self.name, patient) for patient in named)
                return original(self, patients, *args, **options)

            patch.setattr(Dataset, name, watched)
        yield looked_at

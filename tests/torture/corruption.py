"""Files cut off or with flipped bits: a sentence that names the file, or the number that stood there; never another."""

from __future__ import annotations

import random
import traceback
from pathlib import Path

from steph import Refused

from .harness import Case, Report, carry_out
from .scene import NOT_FINISHED, damaged, digest, make, sites


def torture(folder: Path, count: int, seed: int) -> Report:
    """Damage files `count` times, one at a time, spread evenly over all that is read."""
    make(folder)
    keep_originals(folder)
    return carry_out(cases, (folder, seed), count)


def keep_originals(folder: Path) -> None:
    """Keep every file of a scene as it is, for `cases`."""
    for i, site in enumerate(sites(folder)):
        (folder / "originals").mkdir(exist_ok=True)
        (folder / "originals" / str(i)).write_bytes(site.path.read_bytes())


def cases(folder: Path, seed: int) -> Case:
    """The cases over a scene. A file that a process left damaged is mended first."""
    known = sites(folder)
    originals = [(folder / "originals" / str(i)).read_bytes() for i in range(len(known))]
    for site, content in zip(known, originals, strict=True):
        site.path.write_bytes(content)
    expected = [digest(site.read()) for site in known]

    def case(number: int) -> tuple[str, str, str]:
        i, rng = number % len(known), random.Random(f"{seed}/{number}")
        site = known[i]
        content, how = damaged(originals[i], rng)
        site.path.write_bytes(content)
        try:
            value = site.read()
            outcome, details = "another number", f"read without a word ({how})"
            if value is NOT_FINISHED:
                outcome, details = "redone", ""
            elif digest(value) == expected[i]:
                outcome, details = "as it was", ""
            elif site.personal:
                outcome, details = "valid, of a person", ""
        except Refused as refused:
            outcome, details = "refused", ""
            if not any(name in str(refused) for name in (site.path.name, site.path.stem, str(site.path.parent))):
                outcome, details = "no file named", f"{how}: {refused}"
        except BaseException:
            outcome, details = "a traceback", f"{how}: {traceback.format_exc()[-1500:]}"
        finally:
            site.path.write_bytes(originals[i])
        return site.name, outcome, details

    return case

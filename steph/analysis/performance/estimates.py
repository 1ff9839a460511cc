"""Numbers with their 95 % intervals: how an interval is made, written and read."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

BETTER, WORSE, INCONCLUSIVE = "better", "worse", "inconclusive"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval (NaN where there is none)."""

    value: float
    low: float = np.nan
    high: float = np.nan


def student_reach(error: Any, degrees: float, level: float = 0.95) -> Any:
    """Half the width of Student's interval around a mean with this standard error (a number or an array)."""
    from scipy.special import stdtrit

    return stdtrit(degrees, (1 + level) / 2) * error


def reach_of_mean(values: Any, level: float = 0.95) -> float:
    """Half the width of Student's interval around the mean of independent values (N,); NaN for fewer than two."""
    values = np.asarray(values, float)
    n = len(values)
    return float(student_reach(values.std(ddof=1) / np.sqrt(n), n - 1, level)) if n > 1 else np.nan


def around(value: float, *reaches: float) -> Estimate:
    """A number with the widest of several symmetric intervals, each given by half its width; NaN: there is none."""
    reach = max((r for r in reaches if not np.isnan(r)), default=np.nan)
    return Estimate(value, value - reach, value + reach)


def mean_of(values: Any) -> Estimate:
    """Mean of the defined values (N,) with its 95 % interval by Student's t, values taken as independent (patients
    under the very same models, or data sets); NaN where none is defined."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return around(float(values.mean()) if len(values) else np.nan, reach_of_mean(values))


def with_interval(value: Any, low: Any, high: Any, *, form: str = "+.3f", problem: Any = "") -> str:
    """An estimate as text: "0.612 (0.580 to 0.644)", the value alone where there is no interval, "undefined" where
    there is neither. form: of all three numbers. problem: why something is lacking, in brackets."""
    number = "undefined" if pd.isna(value) else f"{value:{form}}"
    if not pd.isna(value) and not pd.isna(low):
        number += f" ({low:{form}} to {high:{form}})"
    return f"{number} ({problem})" if problem else number


def estimates_text(table: pd.DataFrame, value: str, form: str) -> pd.Series:
    """`with_interval` of a column of a table with low, high and, where it has one, problem."""
    problems = table["problem"] if "problem" in table else [""] * len(table)
    numbers = zip(table[value], table["low"], table["high"], problems, strict=True)
    text = [with_interval(*row, form=form, problem=problem) for *row, problem in numbers]
    return pd.Series(text, index=table.index, dtype=object)


def interval(estimate: Estimate, form: str = "+.3f") -> str:
    """The interval as text: "95 % interval +0.010 to +0.050"."""
    if np.isnan(estimate.low):
        return "no interval"
    return f"95 % interval {estimate.low:{form}} to {estimate.high:{form}}"


def conclusion(gain: Estimate) -> str:
    """What a gain shows: `BETTER` where its 95 % interval lies above 0, `WORSE` where it lies below, else
    `INCONCLUSIVE`."""
    if np.isnan(gain.low):
        return f"{INCONCLUSIVE} (no interval)"
    return BETTER if gain.low > 0 else WORSE if gain.high < 0 else INCONCLUSIVE


def answer(gain: Estimate, lacking: str = "") -> dict[str, Any]:
    """Columns of a table that answers: difference, low, high, conclusion. lacking: why there is no gain, where there is
    none."""
    text = f"no answer: {lacking}" if np.isnan(gain.value) else conclusion(gain)
    return {"difference": gain.value, "low": gain.low, "high": gain.high, "conclusion": text}


def p_text(p: float) -> str:
    """A p-value as text; "" where there is none."""
    return "" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"

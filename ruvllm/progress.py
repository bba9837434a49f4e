"""Progress bars: tqdm's, a widget in a notebook that can show one, and no warning in one that cannot."""

import warnings

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # "IProgress not found": the bar is then one of text
    from tqdm.auto import tqdm

__all__ = ["hidden", "tqdm"]


def hidden(progress: bool | None) -> bool | None:
    """tqdm's ``disable`` for an option ``progress``; None shows a bar where stderr is a terminal or a notebook."""
    return None if progress is None else not progress

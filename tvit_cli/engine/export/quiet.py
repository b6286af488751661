"""Other libraries kept from writing to the terminal."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block nothing below an error is logged or warned of; transformers, if loaded, shows no bars."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    transformers = sys.modules.get("transformers.utils.logging")
    has_bars = transformers is not None and transformers.is_progress_bar_enabled()
    try:
        if transformers is not None:
            transformers.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if transformers is not None and has_bars:
            transformers.enable_progress_bar()

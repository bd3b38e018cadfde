"""nnU-Net's chatter kept from those who asked for something else."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def quiet() -> Iterator[None]:
    """Print nothing of what is said in the block, such as where nnU-Net looks for a trainer, unless it fails.

    Nor what libraries say at import of their own future.
    """
    said = io.StringIO()
    try:
        with redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except BaseException:
        print(said.getvalue(), end="")
        raise

"""nnU-Net's chatter kept from those who asked for something else."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def quiet() -> Iterator[None]:
    """Print nothing of what is said in the block, such as where nnU-Net looks for a trainer, unless it fails."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            yield
    except BaseException:
        print(said.getvalue(), end="")
        raise

"""Check of ``nnUNetv2_ext doctor``: what the variable ``nnUNet_ext_settings`` would do to the next training."""

import os
from collections.abc import Iterator

from nnunetv2_ext._register import installed_trainers
from nnunetv2_ext.cli._finding import FAIL, OK, WARN, Finding
from nnunetv2_ext.core.outside import load_trainer


def environment() -> Iterator[Finding]:
    """Often it is still exported from an earlier experiment."""
    # here, so that a broken installation of theirs is a finding and not the end of the report
    from nnunetv2_ext.core.resolve import resolve
    from nnunetv2_ext.core.sources import ENVIRONMENT_VARIABLE, from_environment

    text = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if not text:
        yield Finding(OK, ENVIRONMENT_VARIABLE, "not set: trainings take their defaults")
        return
    remedy = f"unset {ENVIRONMENT_VARIABLE}   (if it belongs to an earlier experiment)"
    try:
        from_environment(text)
    except ValueError as error:
        yield Finding(FAIL, ENVIRONMENT_VARIABLE, str(error), remedy)
        return
    takers, refusals = [], []
    for name in installed_trainers():
        try:
            resolve(load_trainer(name).settings_model(), environment=text)
            takers.append(name)
        except ImportError:
            pass  # a finding of the section on trainers
        except ValueError as error:
            refusals.append(str(error))
    if takers:
        detail = f"{text!r} is what every training of {', '.join(takers)} will take"
        yield Finding(WARN, ENVIRONMENT_VARIABLE, detail, remedy)
    else:
        # a trainer that knows all keys says what is wrong with their values
        says = sorted(refusals, key=lambda text: text.startswith("unknown setting"))[0]
        yield Finding(FAIL, ENVIRONMENT_VARIABLE, says, remedy)

"""examples/adaptations.py measures what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "adaptations.py"


@pytest.mark.slow
def test_the_gain_is_that_of_the_cases_that_were_not_given(model, site, tiny, tmp_path) -> None:
    environment = os.environ | tiny.environment(tmp_path / "results")
    command = [sys.executable, str(SCRIPT), str(model), "--site", str(site), "--output", str(tmp_path / "out")]
    command += ["--folds", "0", "1", "--draws", "2", "--k", "1", "--recipes", "head only, no replay", "--no-mirroring"]
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    out, gains, given = tmp_path / "out", [], []
    for fold in ("0", "1"):
        name = f"fold{fold}_head_only_no_replay_1_{fold}"
        before, after = (json.loads((out / f"scores_{n}.json").read_text()) for n in (f"fold{fold}_before", name))
        [case] = [file.name.removesuffix(".nii.gz") for file in (out / f"{name}_cases" / "labelsTr").iterdir()]
        assert (out / name / f"fold_{fold}" / "checkpoint_final.pth").is_file()
        gains.append(np.mean([after["new"][c] - before["new"][c] for c in before["new"] if c != case]))
        given.append(case)
    assert given[0] != given[1]
    assert f"new {100 * np.mean(gains):+.1f}, old" in done.stdout.splitlines()[-1]

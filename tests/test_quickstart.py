"""examples/quickstart.py: its parts on tiny data, and one reduced run of the whole through the real commands."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_ext.phantom import write_phantom_dataset

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = {"shape": (16, 20, 16), "num_organs": 2}


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import quickstart_steps

    return quickstart_steps


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import quickstart_data

    return quickstart_data


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import quickstart

    return quickstart


def _names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# --- running commands


def _python(steps, monkeypatch, tmp_path, code):
    monkeypatch.setattr(steps, "find_command", lambda name: sys.executable)
    steps.Steps(tmp_path / "log", {"KEPT": "1"}, 7).run("Title", ["python", "-c", code], ADDED="2")


def test_command_gets_its_environment_and_is_logged(steps, monkeypatch, tmp_path, capsys):
    _python(steps, monkeypatch, tmp_path, "import os; print(os.environ['KEPT'] + os.environ['ADDED'])")
    assert "12" in (tmp_path / "log").read_text().splitlines()
    shown = capsys.readouterr().out
    assert "[1 of 7] Title" in shown and "ADDED=2 python -c" in shown and "\n12\n" not in shown


def test_failing_command_shows_its_last_20_lines_and_the_log(steps, monkeypatch, tmp_path):
    with pytest.raises(steps.QuickstartError, match="exit status 3") as error:
        _python(
            steps, monkeypatch, tmp_path, "print(*map('line {}'.format, range(30)), sep='\\n'); raise SystemExit(3)"
        )
    text = str(error.value)
    assert "line 10\n" in text and "line 29\n" in text and "line 9\n" not in text
    assert str(tmp_path / "log") in text
    assert "line 9\n" in (tmp_path / "log").read_text()


def test_missing_command_says_how_to_install(steps):
    with pytest.raises(steps.QuickstartError, match="pip install"):
        steps.find_command("nnUNetv2_no_such_command")


def test_absent_device_is_refused(steps, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert steps.choose_device("auto") == "cpu"
    with pytest.raises(steps.QuickstartError, match="--device cuda"):
        steps.choose_device("cuda")


def test_a_training_shows_each_epoch_and_where_its_log_is(steps, monkeypatch, tmp_path, capsys):
    code = """
for epoch, dice in enumerate(("[0.0, 0.5]", "[np.float32(0.25), np.float64(nan)]", "[nan, nan]")):
    print(f"2026-11-20 18:00:00.1: Epoch {epoch} ")
    print(f"2026-11-20 18:00:00.1: Pseudo dice {dice} ")
    print("2026-11-20 18:00:00.1: Epoch time: 90.0 s ")
"""
    monkeypatch.setattr(steps, "find_command", lambda name: sys.executable)
    steps.Steps(tmp_path / "log", {}, 1).run("Train", ["python", "-c", code], watch=steps.EpochLines(3))
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert f"log: {tmp_path / 'log'}" in shown
    assert [line for line in shown if line.startswith("epoch ")] == [
        "epoch 1 of 3: pseudo Dice 0.250, 90 s, about 3.0 minutes left",
        "epoch 2 of 3: pseudo Dice 0.250, 90 s, about 1.5 minutes left",
        "epoch 3 of 3: pseudo Dice none (no foreground drawn), 90 s",
    ]


def test_a_prediction_shows_each_case(steps):
    watch = steps.CaseLines()
    lines = ("There are 2 cases in the source folder\n", "\n", "Predicting phantom_015:\n", "done\n", "Predicting b:\n")
    assert [text for line in lines if (text := watch(line))] == ["case 1 of 2: phantom_015", "case 2 of 2: b"]


def test_a_step_without_news_of_its_own_shows_that_it_goes_on(steps, monkeypatch, tmp_path, capsys):
    for seconds, lines in ((1000.0, []), (-1.0, ["one", "two"])):
        monkeypatch.setattr(steps, "HEARTBEAT", seconds)
        _python(steps, monkeypatch, tmp_path, "print('one'); print('two')")
        shown = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [words[-1] for words in shown if words[1:2] == ["s"]] == lines


# --- the output folder


def test_output_folder_is_replaced_on_request_only(steps, tmp_path):
    output = tmp_path / "out"
    steps.prepare_output(output, False, None)
    (output / "old").touch()
    with pytest.raises(steps.QuickstartError, match=r"--output .* --overwrite"):
        steps.prepare_output(output, False, None)
    steps.prepare_output(output, True, None)
    assert _names(output) == [steps.LOG_NAME]


def test_a_folder_of_somebody_else_is_never_removed(steps, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(steps.QuickstartError, match="not made by this script"):
        steps.prepare_output(tmp_path, True, None)
    assert _names(tmp_path) == ["thesis.tex"]


def test_overwrite_does_not_remove_the_dataset_it_is_to_use(steps, tmp_path):
    steps.prepare_output(tmp_path / "out", False, None)
    dataset = tmp_path / "out" / "nnUNet_raw" / "Dataset001_Phantom"
    dataset.mkdir(parents=True)
    with pytest.raises(steps.QuickstartError, match="--dataset lies in"):
        steps.prepare_output(tmp_path / "out", True, dataset)
    assert dataset.is_dir()


# --- a user's dataset


def test_adopted_dataset_holds_out_the_last_fifth_and_leaves_the_source_alone(data, tmp_path, capsys):
    source = write_phantom_dataset(tmp_path / "user", 12, num_train=6, num_test=0, **TINY)
    before = {name: (source / name).read_bytes() for name in _names(source)}
    folder = data.adopt_dataset(source, tmp_path / "raw")
    assert "held out by name, not by patient" in capsys.readouterr().out
    assert folder == tmp_path / "raw" / "Dataset012_Phantom"
    assert len(_names(folder / "imagesTr")) == len(_names(folder / "labelsTr")) == 5
    assert _names(folder / "imagesTs") == ["phantom_005_0000.nii.gz"]
    assert (folder / "labelsTs" / "phantom_005.nii.gz").read_bytes() == before["labelsTr/phantom_005.nii.gz"]
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 5
    assert {name: (source / name).read_bytes() for name in _names(source)} == before


def test_adopted_dataset_keeps_its_own_labelled_test_cases(data, tmp_path):
    source = write_phantom_dataset(tmp_path / "user", 12, num_train=2, num_test=2, channels=2, **TINY)
    (source / "labelsTs" / "phantom_003.nii.gz").unlink()  # one unlabelled test case: of no use for evaluation
    folder = data.adopt_dataset(source, tmp_path / "raw")
    assert len(_names(folder / "labelsTr")) == 2
    assert _names(folder / "imagesTs") == ["phantom_002_0000.nii.gz", "phantom_002_0001.nii.gz"]


def test_adopted_dataset_may_list_its_files(data, tmp_path):
    source = write_phantom_dataset(tmp_path / "user", 12, num_train=2, num_test=0, **TINY)
    (source / "imagesTr").rename(source / "scans")
    description = json.loads((source / "dataset.json").read_text())
    description["dataset"] = {
        case: {"images": [f"scans/phantom_{case}_0000.nii.gz"], "label": f"labelsTr/phantom_{case}.nii.gz"}
        for case in ("000", "001")
    }
    (source / "dataset.json").write_text(json.dumps(description))
    folder = data.adopt_dataset(source, tmp_path / "raw")
    assert _names(folder / "imagesTr") == ["000_0000.nii.gz"] and _names(folder / "labelsTs") == ["001.nii.gz"]
    assert "dataset" not in json.loads((folder / "dataset.json").read_text())


def test_a_listed_file_that_is_missing_or_a_list_of_another_form_is_refused(data, tmp_path):
    source = write_phantom_dataset(tmp_path / "user", 12, num_train=2, num_test=0, **TINY)
    description = json.loads((source / "dataset.json").read_text())
    files = {"images": ["imagesTr/phantom_000_0000.nii.gz"], "label": "labelsTr/gone.nii.gz"}
    for listed, text in (
        ({"a": files, "b": files}, r"labelsTr.gone\.nii\.gz is not there"),
        ({"a": {}}, r'the "dataset" of .*dataset\.json is no list of files \(KeyError'),
        ([files], "is no list of files"),
        ({"a": {"images": None, "label": ""}}, "is no list of files"),
    ):
        (source / "dataset.json").write_text(json.dumps({**description, "dataset": listed}))
        with pytest.raises(data.QuickstartError, match=text):
            data.adopt_dataset(source, tmp_path / "raw")


def test_a_description_needs_no_count_and_may_use_the_old_name_of_channels(data, tmp_path):
    source = write_phantom_dataset(tmp_path / "user", 12, num_train=2, num_test=0, **TINY)
    description = json.loads((source / "dataset.json").read_text())
    description["modality"] = description.pop("channel_names")
    del description["numTraining"]
    (source / "dataset.json").write_text(json.dumps(description))
    folder = data.adopt_dataset(source, tmp_path / "raw")
    assert data.read_description(folder) == {**description, "numTraining": 1}


def test_test_cases_alone_are_not_enough(data, tmp_path):
    source = write_phantom_dataset(tmp_path / "user", 12, num_train=1, num_test=1, **TINY)
    (source / "labelsTr" / "phantom_000.nii.gz").unlink()
    with pytest.raises(
        data.QuickstartError, match=r"has 0 labelled training .* at least 1, each with imagesTr/CASE_0000"
    ):
        data.adopt_dataset(source, tmp_path / "raw")


def test_an_image_that_no_reader_opens_is_named_without_tracebacks(data, steps, tmp_path, capsys):
    source = write_phantom_dataset(tmp_path / "user", 12, num_train=2, num_test=0, **TINY)
    broken = source / "imagesTr" / "phantom_001_0000.nii.gz"
    broken.write_text("not an image")
    folder = data.adopt_dataset(source, tmp_path / "raw")  # phantom_001 is held out
    with pytest.raises(steps.QuickstartError, match="cannot be opened by any reader of nnU-Net") as error:
        steps.is_volume(folder)
    assert str(error.value).startswith(str(broken.resolve()))  # the user's file, not our link to it
    assert "Traceback" not in capsys.readouterr().err


def test_what_is_no_dataset_is_refused(data, tmp_path):
    (tmp_path / "Dataset001_Empty").mkdir()
    for folder in (tmp_path / "Dataset001_Empty", tmp_path / "missing"):
        with pytest.raises(data.QuickstartError, match="no nnU-Net raw dataset"):
            data.adopt_dataset(folder, tmp_path / "raw")
    single = write_phantom_dataset(tmp_path, 2, num_train=1, num_test=0, **TINY)
    with pytest.raises(data.QuickstartError, match="at least 2"):
        data.adopt_dataset(single, tmp_path / "raw")


GROUPED = [  # two cases of each of five patients, one left out
    {"train": ["phantom_002", "phantom_003", "phantom_004", "phantom_005"], "val": ["phantom_000", "phantom_001"]},
    {"train": ["phantom_000", "phantom_001", "phantom_004", "phantom_005"], "val": ["phantom_002", "phantom_003"]},
    {"train": ["phantom_000", "phantom_001", "phantom_002", "phantom_003"], "val": ["phantom_004", "phantom_005"]},
]


def test_a_known_split_says_what_is_held_out_and_keeps_groups_together(data, tmp_path, capsys):
    source = write_phantom_dataset(tmp_path / "user", 12, num_train=7, num_test=0, **TINY)
    folder = data.adopt_dataset(source, tmp_path / "raw", GROUPED, Path("splits_final.json"))
    shown = capsys.readouterr().out
    assert "fold 0 in splits_final.json" in shown and "not by patient" not in shown
    assert _names(folder / "labelsTs") == ["phantom_000.nii.gz", "phantom_001.nii.gz"]
    trained = [name.removesuffix(".nii.gz") for name in _names(folder / "labelsTr")]
    assert trained == ["phantom_002", "phantom_003", "phantom_004", "phantom_005"]  # whose phantom_006 is, nobody says
    assert data.inner_splits(GROUPED, trained) == [
        {"train": ["phantom_004", "phantom_005"], "val": ["phantom_002", "phantom_003"]},
        {"train": ["phantom_002", "phantom_003"], "val": ["phantom_004", "phantom_005"]},
    ]
    assert data.inner_splits(GROUPED[:1], trained) == []
    assert data.inner_splits([{"train": trained, "val": trained}], trained) == []


def test_a_split_of_other_cases_is_not_used(data, tmp_path, capsys):
    source = write_phantom_dataset(tmp_path / "user", 12, num_train=2, num_test=0, **TINY)
    folder = data.adopt_dataset(source, tmp_path / "raw", [{"train": ["a"], "val": ["b"]}], Path("splits_final.json"))
    assert _names(folder / "labelsTs") == ["phantom_001.nii.gz"]
    shown = capsys.readouterr().out
    assert "splits_final.json is of other cases" in shown and "not by patient" in shown


def test_a_split_file_is_read_or_refused(data, tmp_path):
    path = tmp_path / "splits_final.json"
    assert data.read_splits(path) == []
    path.write_text(json.dumps(GROUPED))
    assert data.read_splits(path) == GROUPED
    for text in ('[{"train": ["a"]}]', "[1]", "{", "3"):
        path.write_text(text)
        with pytest.raises(data.QuickstartError, match="is not a split file of nnU-Net"):
            data.read_splits(path)


# --- reduced plans, names, picture


def _plans(dimensions=3, stages=6, patch=(128, 128, 128), strides=None):
    network = {
        "n_stages": stages,
        "features_per_stage": [min(320, 32 * 2**i) for i in range(stages)],
        "kernel_sizes": [[3] * dimensions] * stages,
        "strides": strides or [[1] * dimensions] + [[2] * dimensions] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }
    settings = {
        "data_identifier": "nnUNetPlans_x",
        "batch_size": 7,
        "patch_size": list(patch),
        "architecture": {"arch_kwargs": network},
    }
    return {"plans_name": "nnUNetPlans", "configurations": {"x": settings, "2d": {}}}


@pytest.mark.parametrize(
    ("plans", "patch"),
    [
        (_plans(), [32, 32, 32]),
        (_plans(patch=(40, 56, 40), stages=4), [32, 40, 32]),
        (_plans(patch=(16, 16, 16), stages=3), [16, 16, 16]),
        (_plans(2, 8, (512, 384)), [144, 112]),
        (
            _plans(patch=(20, 256, 224), strides=[[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]]),
            [6, 88, 72],
        ),
    ],
)
def test_reduced_plans_fit_their_strides_and_reuse_the_data(steps, plans, patch):
    original = json.dumps(plans)
    small = steps.reduce_plans(plans, ["x"])
    assert json.dumps(plans) == original
    settings = small["configurations"]["x"]
    network = settings["architecture"]["arch_kwargs"]
    assert small["plans_name"] == "nnUNetPlans_small" and settings["data_identifier"] == "nnUNetPlans_x"
    assert settings["batch_size"] == 2 and settings["patch_size"] == patch
    assert (np.array(patch) % np.prod(network["strides"], axis=0) == 0).all()
    assert network["features_per_stage"] == [16, 32, 64, 128][: network["n_stages"]]
    lengths = {key: len(value) for key, value in network.items() if isinstance(value, list)}
    assert lengths.pop("n_conv_per_stage_decoder") == network["n_stages"] - 1
    assert set(lengths.values()) == {network["n_stages"]}


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """nnUNet_preprocessed with a planned dataset 7."""
    folder = tmp_path / "preprocessed" / "Dataset007_X"
    folder.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(_plans()))
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    return folder


@pytest.mark.parametrize("name", ["7", "Dataset007_X", "a folder"])
def test_small_plans_only_writes_them_beside_the_plans_and_runs_nothing_else(quickstart, planned, tmp_path, name):
    plans = json.loads((planned / "nnUNetPlans.json").read_text())
    plans["configurations"] = {"3d_fullres": plans["configurations"]["x"], "3d_cascade_fullres": {"inherits_from": "x"}}
    (planned / "nnUNetPlans.json").write_text(json.dumps(plans))
    raw = tmp_path / "raw" / "Dataset007_X"
    raw.mkdir(parents=True)
    before = _names(tmp_path)
    given = str(raw) if name == "a folder" else name
    assert quickstart.main(["--dataset", given, "--small-plans-only"]) == 0
    assert set(_names(tmp_path)) - set(before) == {"preprocessed/Dataset007_X/nnUNetPlans_small.json"}
    small = json.loads((planned / "nnUNetPlans_small.json").read_text())
    assert small["plans_name"] == "nnUNetPlans_small" and list(small["configurations"]) == ["3d_fullres"]
    assert small["configurations"]["3d_fullres"]["patch_size"] == [32, 32, 32]
    assert not Path("quickstart_output").exists()


def test_small_plans_replace_others_on_request_only(quickstart, planned, capsys):
    file = planned / "nnUNetPlans_small.json"
    command = ["--dataset", "7", "--small-plans-only"]
    file.write_text("mine")
    assert quickstart.main(command) == 1
    assert "holds other plans: replace it with --overwrite" in capsys.readouterr().err and file.read_text() == "mine"
    assert quickstart.main([*command, "--overwrite"]) == 0 and file.read_text() != "mine"
    assert quickstart.main(command) == 0, "its own plans again"


def test_small_plans_of_what_is_not_planned_are_refused(quickstart, planned, capsys):
    assert quickstart.main(["--dataset", "8", "--small-plans-only"]) == 1
    assert "there is no dataset 8" in capsys.readouterr().err
    (planned / "nnUNetPlans.json").unlink()
    assert quickstart.main(["--dataset", "7", "--small-plans-only"]) == 1
    assert "nnUNetv2_plan_and_preprocess -d 7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quickstart.main(["--small-plans-only"])


def test_names_of_classes_and_regions(steps):
    classes = {"labels": {"background": 0, "liver": 1, "ignore": 2}}
    assert steps.class_names(classes) == {0: "background", 1: "liver", 2: "ignore"}
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, "regions_class_order": [1, 2]}
    assert steps.class_names(regions) == {0: "background", 1: "whole", 2: "core"}
    assert steps.metric_names(regions)["(1, 2)"] == "whole" and steps.metric_names(classes)["1"] == "liver"


def test_picture_of_a_case(steps, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    dataset = write_phantom_dataset(tmp_path, 3, num_train=1, num_test=1, spacing=(1, 1, 2), **TINY)
    truth = dataset / "labelsTs" / "phantom_001.nii.gz"
    metrics = {"1": {"Dice": 1.0}, "2": {"Dice": float("nan")}}
    result = {"reference_file": str(truth), "prediction_file": str(truth), "metrics": metrics}
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: figures.append(self) or save(self, *args, **how))
    steps.draw_case(dataset, {"Plain": result, "Method": result}, tmp_path / "overlay.png")
    picture = imread(tmp_path / "overlay.png")[..., :3]
    coloured = (picture.max(-1) - picture.min(-1) > 0.2).mean(axis=0)
    quarter = len(coloured) // 4
    legend = (picture.max(-1) - picture.min(-1) > 0.2)[-60:].mean()
    assert legend > 0
    # only truth and predictions are coloured, and here alike
    panels = [coloured[k * quarter + 30 : (k + 1) * quarter - 30].sum() for k in range(4)]
    assert panels[0] < panels[1] / 3
    assert panels[1] == pytest.approx(panels[2], rel=0.3) and panels[1] == pytest.approx(panels[3], rel=0.3)
    (figure,) = figures
    assert figure.get_suptitle() == "Dataset003_Phantom, phantom_001: not seen in training"
    assert [axes.get_title() for axes in figure.axes[:4]] == [
        "image",
        "truth",
        "Plain\nmean Dice 1.000",
        "Method\nmean Dice 1.000",
    ]
    assert [axes.get_ylabel().split(",")[0] for axes in figure.axes[::4]] == ["axial", "coronal", "sagittal"]
    # the phantom's file says: the first row is the front
    scan = sitk.GetArrayFromImage(
        sitk.ReadImage(str(truth).replace("labelsTs", "imagesTs").replace(".nii", "_0000.nii"))
    )
    index = int(figure.axes[0].get_ylabel().split()[-1])
    assert np.allclose(figure.axes[0].images[0].get_array(), scan[index])


def test_report_prints_every_class_of_both_and_returns_the_mean_of_the_method(steps, capsys):
    cases = [{}, {}]
    plain = {"1": {"Dice": 0.8}, "2": {"Dice": 0.25}}
    ours = {"1": {"Dice": 0.9}, "2": {"Dice": 0.5}}
    summaries = {
        "Plain": {"metric_per_case": cases, "mean": plain, "foreground_mean": {"Dice": 0.525}},
        "nnUNetTrainerX": {"metric_per_case": cases, "mean": ours, "foreground_mean": {"Dice": 0.7}},
    }
    assert steps.report(summaries, {"labels": {"background": 0, "liver": 1, "spleen": 2}}) == 0.7
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert "2 unseen" in shown and ["Plain", "nnUNetTrainerX"] in rows
    assert (
        ["liver", "0.800", "0.900"] in rows
        and ["spleen", "0.250", "0.500"] in rows
        and ["mean", "0.525", "0.700"] in rows
    )
    assert "says nothing about the method" in shown


@pytest.mark.parametrize(("dice", "hint"), [((0.0, float("nan")), True), ((0.0, 0.01), False)])
def test_a_network_that_predicts_background_only_is_called_that(steps, capsys, dice, hint):
    mean = {str(label): {"Dice": value} for label, value in enumerate(dice, 1)}
    summary = {"metric_per_case": [{}], "mean": mean, "foreground_mean": {"Dice": 0.0}}
    steps.report({"TrainerX": summary}, {"labels": {"background": 0, "liver": 1, "spleen": 2}})
    expected = "TrainerX has not left the background yet: raise --iterations"
    assert (expected in capsys.readouterr().out) == hint


# --- the script


def test_mistakes_end_with_one_line_and_status_1(quickstart, tmp_path, capsys):
    output = str(tmp_path / "out")
    assert quickstart.main(["--dataset", str(tmp_path / "none"), "--output", output, "--device", "cpu"]) == 1
    assert "quickstart stopped: --dataset" in capsys.readouterr().err
    assert quickstart.main(["--output", output, "--device", "cpu", "--overwrite", "--shape", "4", "4", "4"]) == 1
    assert "phantom shape must be" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quickstart.main(["--epochs", "0"])


def _stopped(quickstart, capsys, *arguments):
    """The one line on stderr with which the script stops with status 1."""
    assert quickstart.main([*map(str, arguments), "--device", "cpu"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("quickstart stopped: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"file_ending": None}, 'no valid "file_ending" (such as ".nii.gz")'),
        ({"file_ending": "nii.gz"}, 'no valid "file_ending"'),
        ({"channel_names": None}, 'no valid "channel_names" (such as {"0": "T1"})'),
        ({"channel_names": ["T1"]}, 'no valid "channel_names"'),
        ({"labels": None}, 'no valid "labels" (such as {"background": 0, "liver": 1})'),
        ({"labels": {"0": "background", "1": "liver"}}, 'no valid "labels"'),
        ({"labels": None, "file_ending": None}, '1}), "file_ending"'),
        ("{oops", "cannot be read as JSON (Expecting property name"),
        (b"\xff\xfe", "cannot be read as JSON ('utf-8' codec"),
        ("[1]", "holds a list instead of a JSON object"),
    ],
)
def test_a_mistake_in_dataset_json_is_named_before_anything_is_touched(quickstart, tmp_path, capsys, change, cause):
    description = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    if isinstance(change, dict):
        change = json.dumps({key: value for key, value in {**description, **change}.items() if value is not None})
    path = tmp_path / "Dataset001_User" / "dataset.json"
    path.parent.mkdir()
    path.write_bytes(change if isinstance(change, bytes) else change.encode())
    before = path.read_bytes()
    earlier = tmp_path / "out"
    earlier.mkdir()
    (earlier / "quickstart.log").write_text("of an earlier run")
    line = _stopped(quickstart, capsys, "--dataset", path.parent, "--output", earlier, "--overwrite")
    assert str(path) in line and cause in line
    assert (earlier / "quickstart.log").read_text() == "of an earlier run" and path.read_bytes() == before


def test_a_file_is_no_output_folder_nor_has_one_below_it(quickstart, tmp_path, capsys):
    file = tmp_path / "thesis.tex"
    file.write_text("precious")
    for output in (file, file / "out"):
        line = _stopped(quickstart, capsys, "--output", output, "--overwrite")
        assert f"--output {output} cannot be made" in line and "choose a folder" in line
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    ("names", "named"), [((), "out"), (("file",), "file"), (("from", None, "to"), "to")], ids=["open", "one", "two"]
)
def test_a_full_disk_is_named_with_its_file(quickstart, monkeypatch, tmp_path, capsys, names, named):
    def write(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", *(name and str(tmp_path / name) for name in names))

    monkeypatch.setattr(quickstart, "write_phantom_dataset", write)
    line = _stopped(quickstart, capsys, "--output", tmp_path / "out")
    assert f"stopped: {tmp_path / named}: No space left on device" in line and "--output" in line


@pytest.mark.parametrize(("dice", "status"), [(0.81, 0), (0.79, 1), (float("nan"), 1)])
def test_status_tells_whether_the_phantom_was_learnt(quickstart, monkeypatch, dice, status):
    monkeypatch.setattr(quickstart, "run", lambda options: dice)
    assert quickstart.main([]) == status
    assert quickstart.main(["--dataset", "Dataset001_X"]) == 0  # no promise about other data


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_reduced_run_through_the_real_commands(tmp_path):
    """One step of training: everything must be there, and a model that cannot have learnt must be called that."""
    output = tmp_path / "out"
    sizes = ["--shape", "16", "20", "16", "--num-train", "5", "--num-test", "1", "--epochs", "1", "--iterations", "1"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), "--output", str(output), "--device", "cpu", *sizes],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert "the model did not learn" in done.stderr, done.stdout + done.stderr
    assert done.returncode == 1
    for trainer in ("nnUNetTrainerExt", "nnUNetTrainerMedContext"):
        assert (output / "predictions" / trainer / "phantom_005.nii.gz").is_file()
        assert json.loads((output / f"dice_{trainer}.json").read_text())["foreground_mean"]["Dice"] < 0.8
        assert f"-tr {trainer}" in done.stdout
    assert (output / "overlay.png").is_file()
    assert "epoch 1 of 1: pseudo Dice" in done.stdout and "case 1 of 1: phantom_005" in done.stdout, done.stdout
    assert "[8 of 8]" in done.stdout and "nnUNetPlans_small" in done.stdout
    panels = list(output.rglob("panel_epoch_*.png"))
    assert panels and all(str(panel) in done.stdout for panel in panels)
    # what it proposes can be typed
    environment = {f"nnUNet_{kind}": str(output / f"nnUNet_{kind}") for kind in ("raw", "preprocessed", "results")}
    (command,) = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("nnUNetv2_ext compare")]
    command[0] = str(Path(sys.executable).with_name("nnUNetv2_ext"))
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, **environment}, timeout=120)
    assert not (EXAMPLES / "nnUNet_raw").exists()

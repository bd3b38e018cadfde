"""Vectors of a dataset: what is computed, what is kept, and when it is computed again."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnunetv2_ext.data.preprocessed import Preprocessed, plans_key
from nnunetv2_ext.rada.annotation.cases import CaseSource, SparseCase, cache_root, case_sources
from nnunetv2_ext.rada.annotation.planes import Planes
from nnunetv2_ext.rada.semantics import regions
from nnunetv2_ext.rada.semantics.clip_encoder import load_encoder
from nnunetv2_ext.rada.semantics.clip_model import ClipSource
from nnunetv2_ext.rada.semantics.embed import embed_cases, report
from nnunetv2_ext.rada.semantics.regions import representatives
from nnunetv2_ext.rada.semantics.slices import encoder_input, intensity_window, rescale

IGNORE, PROMPTS = 3, ("a background", "a liver", "a spleen")


def sparse_case(seed, planes=((5,), (6,), ())):
    """20 x 24 x 16 voxels, a bright and a dark ball, annotated on `planes`."""
    rng = np.random.default_rng(seed)
    grid = np.indices((20, 24, 16))
    dense = np.zeros((20, 24, 16), dtype=np.int8)
    for label, centre in ((1, (6, 8, 6)), (2, (12, 16, 9))):
        dense[sum((g - c) ** 2 for g, c in zip(grid, centre)) <= 25] = label
    image = np.array([0.0, 1.0, -1.0])[dense] + 0.2 * rng.standard_normal(dense.shape)
    label = np.full_like(dense, IGNORE)
    for axis, indices in enumerate(planes):
        for index in indices:
            where = (slice(None),) * axis + (index,)
            label[where] = dense[where]
    return SparseCase(image.astype(np.float32), label, (2.0, 1.0, 1.0))


class Counter:
    """Makes encoders and case sources and counts what is asked of them."""

    def __init__(self, source, root):
        self.source, self.root, self.made, self.loaded = source, root, 0, []

    def make_encoder(self):
        self.made += 1
        return load_encoder(self.source, log=lambda _: None)

    def case(self, name, seed, planes=((5,), (6,), ()), state=0):
        def load():
            self.loaded.append(name)
            return sparse_case(seed, planes)

        return CaseSource(name, planes, state, load)

    def run(self, cases=None, prompts=PROMPTS, region="crop", key=None, log=lambda _: None):
        self.made, self.loaded = 0, []
        cases = [self.case("a", 1), self.case("b", 2)] if cases is None else cases
        key = self.source.identity() if key is None else key
        return embed_cases(cases, prompts, self.make_encoder, self.root, key, region, log)


@pytest.fixture
def counter(tiny_clip, tmp_path):
    source = ClipSource(tiny_clip.name, str(tiny_clip.weights), str(tiny_clip.alpha_weights))
    return Counter(source, tmp_path / "cache")


@pytest.mark.parametrize("region", ["alpha", "crop", "pool"])
def test_vectors_are_the_encoders(counter, region):
    found = counter.run(region=region)
    encoder = counter.make_encoder()
    encode = encoder.encode_pooled if region == "pool" else encoder.encode_images
    assert found.cases == ("a", "b")
    assert found.vectors.shape == (2, 3, 3, 16) and found.vectors.dtype == torch.float32
    torch.testing.assert_close(found.text, encoder.encode_text(PROMPTS), atol=1e-5, rtol=0)
    for number, seed in enumerate((1, 2)):
        case = sparse_case(seed)
        window = intensity_window(case.image)
        for axis, index, spacing in ((0, 5, (1.0, 1.0)), (1, 6, (2.0, 1.0))):
            labels = case.label.take(index, axis)
            for label in (1, 2):
                mask = labels == label
                assert bool(found.present[number, axis, label]) == bool(mask.any())
                if not mask.any():
                    continue
                image, alpha = encoder_input(
                    rescale(case.image.take(index, axis), window), mask, spacing, encoder.image_size, region
                )
                expected = encode(image[None], alpha[None])[0]
                torch.testing.assert_close(found.vectors[number, axis, label], expected, atol=1e-5, rtol=0)
        assert not found.present[number, 2].any(), "no plane on that axis"
        assert not found.present[number, :, 0].any()
        assert not found.vectors[number][~found.present[number]].any()
    assert found.present[:, 0, 1].all()


def test_background_is_of_the_plane_with_most_foreground(counter):
    case = sparse_case(1)
    counts = [int(((case.label.take(i, a) > 0) & (case.label.take(i, a) < IGNORE)).sum()) for a, i in ((0, 5), (1, 6))]
    axis, index = ((0, 5), (1, 6))[int(np.argmax(counts))]
    found = counter.run(region="alpha")
    encoder = counter.make_encoder()
    picture = rescale(case.image.take(index, axis), intensity_window(case.image))
    spacing = preprocessed_spacing(case.spacing, axis)
    image, alpha = encoder_input(picture, case.label.take(index, axis) == 0, spacing, 32, "alpha")
    torch.testing.assert_close(
        found.background[0], encoder.encode_images(image[None], alpha[None])[0], atol=1e-5, rtol=0
    )
    assert found.background.any(1).tolist() == [True, True]


def preprocessed_spacing(spacing, axis):
    return tuple(value for number, value in enumerate(spacing) if number != axis)


def test_planes_of_one_axis_are_averaged_on_the_sphere(counter):
    apart, one, two = (
        counter.run([counter.case("a", 1, planes)], region="alpha", key={**counter.source.identity(), "n": n})
        for n, planes in enumerate((((4, 8), (), ()), ((4,), (), ()), ((8,), (), ())))
    )
    expected = F.normalize(one.vectors[0, 0, 1] + two.vectors[0, 0, 1], dim=0)
    torch.testing.assert_close(apart.vectors[0, 0, 1], expected, atol=1e-5, rtol=0)


def test_slabs_count_once():
    assert representatives(()) == ()
    assert representatives((4,)) == (4,)
    assert representatives((4, 5)) == (4,)
    assert representatives((9, 3, 7, 8)) == (3, 8)


def test_everything_is_unit_length(counter):
    found = counter.run()
    for vectors in (found.vectors[found.present], found.background, found.text):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))


def test_second_run_reads_the_disk_only(counter):
    first = counter.run()
    assert counter.made == 1 and counter.loaded == ["a", "b"]
    second = counter.run()
    assert counter.made == 0 and counter.loaded == [], "neither open_clip nor the images are touched"
    for name in ("vectors", "present", "background", "text"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_what_changed_is_computed_again(counter, tiny_clip, tmp_path):
    first = counter.run()
    texts = counter.run(prompts=("a background", "a liver", "an apple"))
    assert counter.made == 1 and counter.loaded == [], "prompts: the text alone"
    assert torch.equal(texts.vectors, first.vectors)
    assert torch.equal(texts.text[:2], first.text[:2]) and not torch.equal(texts.text[2], first.text[2])

    counter.run([counter.case("a", 1, planes=((5, 9), (6,), ())), counter.case("b", 2)])
    assert counter.loaded == ["a"], "planes of one case"
    counter.run([counter.case("a", 1, planes=((5, 9), (6,), ())), counter.case("b", 2, state=1)])
    assert counter.loaded == ["b"], "files of one case"

    counter.run(key={**counter.source.identity(), "plans": "others"})
    assert counter.made == 1 and counter.loaded == ["a", "b"], "plans: everything"
    counter.run(region="pool")
    assert counter.made == 1 and counter.loaded == ["a", "b"], "region: everything"
    state = {**tiny_clip.state, "visual.proj": -tiny_clip.state["visual.proj"]}
    torch.save(state, tmp_path / "other.pt")
    counter.source = replace(counter.source, weights=str(tmp_path / "other.pt"))
    counter.run()
    assert counter.made == 1 and counter.loaded == ["a", "b"], "weights: everything"
    counter.source = replace(counter.source, weights=str(tiny_clip.weights), alpha_weights=None)
    counter.run()
    assert counter.made == 1 and counter.loaded == ["a", "b"], "Alpha-CLIP's weights: everything"


def test_cases_of_another_fold_are_added(counter):
    counter.run([counter.case("a", 1)])
    found = counter.run([counter.case("b", 2), counter.case("a", 1)])
    assert counter.loaded == ["b"] and found.cases == ("b", "a")


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_batches_reach_over_cases_and_change_nothing(counter, monkeypatch, batch):
    cases = [counter.case(name, seed) for name, seed in (("a", 1), ("b", 2), ("c", 3))]
    expected = counter.run(cases)
    monkeypatch.setattr(regions, "BATCH", batch)
    found = counter.run(cases, key={**counter.source.identity(), "batch": batch})
    assert counter.loaded == ["a", "b", "c"]
    torch.testing.assert_close(found.vectors, expected.vectors, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.background, expected.background, atol=1e-5, rtol=0)


def test_interrupted_run_goes_on(counter, monkeypatch):
    monkeypatch.setattr(regions, "BATCH", 1)
    broken = counter.case("b", 2)

    def die():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        counter.run([counter.case("a", 1), replace(broken, load=die)])
    counter.run()
    assert counter.loaded == ["b"]


def test_damaged_file_is_computed_again(counter):
    first = counter.run()
    (path,) = counter.root.glob("regions_*/a.*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    (text,) = counter.root.glob("text_*/*.safetensors")
    text.write_bytes(b"")
    again = counter.run()
    assert counter.loaded == ["a"]
    torch.testing.assert_close(first.vectors, again.vectors, atol=1e-5, rtol=0)  # other batches, other rounding
    assert torch.equal(first.text, again.text)


def test_key_is_kept_readable(counter):
    counter.run()
    (path,) = counter.root.glob("regions_*/key.json")
    key = json.loads(path.read_text())
    assert key["region"] == "crop" and key["weights"].startswith("sha256:")


def _other_process(source, root):
    torch.set_num_threads(1)
    Counter(source, root).run()


def test_processes_do_not_disturb_each_other(counter, tiny_clip):
    # local-dir, because the other processes have not registered the tiny model's name
    counter.source = ClipSource(tiny_clip.local_dir)
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    others = [context.Process(target=_other_process, args=(counter.source, counter.root)) for _ in range(2)]
    torch.set_num_threads(1)
    for other in others:
        other.start()
    for other in others:
        other.join(100)
    assert [other.exitcode for other in others] == [0, 0]
    counter.run()
    assert counter.loaded == []
    assert not list(counter.root.rglob("*.tmp"))


def test_a_case_without_planes_is_named(counter):
    with pytest.raises(ValueError, match="case a: it has no annotated plane"):
        counter.run([counter.case("a", 1, ((), (), ()))])


def test_image_that_is_not_finite_names_the_case(counter):
    case = sparse_case(1)
    case.image[:] = np.nan
    with pytest.raises(ValueError, match="case a: the image has voxels that are not finite"):
        counter.run([replace(counter.case("a", 1), load=lambda: case)])


def test_outside_of_the_body_is_neither_class_nor_background(counter):
    case = sparse_case(1)
    case.label[5][case.label[5] == 0] = -1
    source = replace(counter.case("a", 1, ((5,), (), ())), load=lambda: case)
    found = counter.run([source])
    assert not found.background[0].any()
    assert found.present[0, 0, 1]


def test_hidden_labels_change_nothing(counter):
    """Only annotated planes are read: whatever else the label holds has no influence."""
    first = counter.run()
    noisy = sparse_case(1)
    hidden = noisy.label == IGNORE
    noisy.label[hidden] = np.random.default_rng(0).integers(0, 3, int(hidden.sum()))
    second = counter.run([replace(counter.case("a", 1, state="noisy"), load=lambda: noisy)])
    torch.testing.assert_close(first.vectors[:1], second.vectors, atol=1e-5, rtol=0)
    torch.testing.assert_close(first.background[:1], second.background, atol=1e-5, rtol=0)


def told(vectors, present, background):
    lines = []
    report(vectors, present, background, lines.append)
    return [float(text) for text in re.findall(r"\d\.\d{3}|nan", lines[0])], lines[1:]


def test_mean_cosines_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.rand(4, 3, 3, 5, generator=generator), dim=-1)
    present = torch.rand(4, 3, 3, generator=generator) > 0.4
    present[:, :, 0] = False
    has = torch.tensor([True, False, True, True])
    background = F.normalize(torch.rand(4, 5, generator=generator), dim=-1) * has[:, None]
    items = [(c, vectors[n, a, c]) for n in range(4) for a in range(3) for c in range(3) if present[n, a, c]]
    cosines = {"within": [], "between": [], "background": []}
    for i, (c, v) in enumerate(items):
        for d, u in items[:i]:
            cosines["within" if c == d else "between"].append(float(v @ u))
        cosines["background"] += [float(v @ background[n]) for n in range(4) if has[n]]
    found, _ = told(vectors, present, background)
    assert found == pytest.approx([np.mean(values) for values in cosines.values()], abs=6e-4)


@pytest.mark.parametrize(("between", "background", "warns"), [(0.0, 0.0, False), (0.99, 0.0, True), (None, 0.99, True)])
def test_a_small_gap_is_warned_about(between, background, warns):
    def towards_first(cosine):
        return torch.tensor([cosine, (1 - cosine**2) ** 0.5])

    vectors, present = torch.zeros(2, 3, 3, 2), torch.zeros(2, 3, 3, dtype=torch.bool)
    present[:, 0, 1], vectors[:, 0, 1] = True, towards_first(1.0)
    if between is not None:
        present[:, 0, 2], vectors[:, 0, 2] = True, towards_first(between)
    found, warnings = told(vectors, present, towards_first(background).expand(2, 2))
    nan = math.nan if between is None else between
    assert found[:2] == [1.0, pytest.approx(nan, nan_ok=True)] and len(warnings) == warns
    assert all(line.startswith("WARNING") and "rada.semantics=learned" in line for line in warnings)
    # one region alone: nothing to compare
    assert told(vectors[:1, :, :2], present[:1, :, :2], torch.zeros(1, 2)) == (
        [pytest.approx(math.nan, nan_ok=True)] * 3,
        [],
    )


class FakePreprocessed:
    """A preprocessed configuration as far as it is used."""

    def __init__(self, folder: Path, cases):
        self.folder, self.cases, self.loaded = folder, cases, []

    file_state = Preprocessed.file_state

    def read_case(self, name):
        self.loaded.append(name)
        case = self.cases[name]
        return np.stack((case.image, -case.image)), case.label[None], {}


@pytest.fixture
def folder(tmp_path, counter):
    """``folder()``: embeds nnU-Net's preprocessed cases as a trainer does; keyword arguments replace ours."""
    base = tmp_path / "nnUNet_preprocessed" / "Dataset001_X"
    configuration = base / "nnUNetPlans_3d_fullres"
    configuration.mkdir(parents=True)
    cases = {"a": sparse_case(1), "b": sparse_case(2), "c": sparse_case(3)}
    for name in cases:
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (configuration / f"{name}{ending}").write_text(name)
    dataset = FakePreprocessed(configuration, cases)
    planes = {"b": Planes(((5,), (6,), ())), "a": Planes(((5,), (6,), ())), "c": Planes(((), (), ()))}
    plans = {"data_identifier": "nnUNetPlans_3d_fullres", "spacing": [2.0, 1.0, 1.0], "batch_size": 2}

    def run(**changes):
        dataset.loaded.clear()
        configuration, channel = changes.get("configuration", plans), changes.get("channel", 0)
        sources = case_sources(dataset, planes, plans["spacing"], channel)
        key = {**plans_key("nnUNetPlans", configuration), **counter.source.identity(), "channel": channel}
        return embed_cases(sources, PROMPTS, counter.make_encoder, cache_root(base), key, "alpha", lambda _: None)

    run.dataset, run.base, run.configuration, run.plans = dataset, base, configuration, plans
    return run


def test_preprocessed_cases(folder, counter):
    before = {path.name: path.stat().st_mtime_ns for path in folder.configuration.iterdir()}
    found = folder()
    assert found.cases == ("a", "b"), "those with planes"
    torch.testing.assert_close(found.vectors, counter.run(region="alpha").vectors)
    assert {path.name: path.stat().st_mtime_ns for path in folder.configuration.iterdir()} == before, "untouched"
    assert all(
        path.parent.parent == folder.base / "nnunetv2_ext" / "rada" for path in folder.base.rglob("*.safetensors")
    )
    folder()
    assert folder.dataset.loaded == []


def test_preprocessed_cases_are_embedded_again_when_they_change(folder):
    folder()
    os.utime(folder.configuration / "a_seg.b2nd", ns=(1, 1))
    folder()
    assert folder.dataset.loaded == ["a"]
    folder(configuration={**folder.plans, "batch_size": 9})
    assert folder.dataset.loaded == [], "of no influence on the data"
    folder(configuration={**folder.plans, "normalization_schemes": ["CTNormalization"]})
    assert folder.dataset.loaded == ["a", "b"]
    folder(channel=1)
    assert folder.dataset.loaded == ["a", "b"]


def test_missing_channel_names_the_case(folder):
    with pytest.raises(ValueError, match=r"rada.image_channel=2: case a has 2 image channels"):
        folder(channel=2)


def test_open_clip_is_imported_only_where_vectors_are_made():
    code = (
        "import sys; import nnunetv2_ext.rada.semantics.embed, nnunetv2_ext.rada.semantics.clip_model;"
        "import nnunetv2_ext.rada.propagation.propagate;"
        "sys.exit('open_clip' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

"""Episodes: a batch and guides of other subjects for each of its patches."""

from __future__ import annotations

from collections import Counter

import pytest

from nnunetv2_ext.jras.episodes import EpisodeLoader, require_subjects
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def loader(make_trainer, small_jras):
    def make(settings: str = "", configuration: str = "2d") -> EpisodeLoader:
        keys = {pair.split("=")[0] for pair in settings.split()}
        base = " ".join(pair for pair in small_jras.split() if pair.split("=")[0] not in keys)
        text = f"{base} seed=3 batch_size=2 {settings}"
        trainer = make_trainer(nnUNetTrainerJRAS, text, configuration=configuration)
        trainer.initialize()
        trainer.get_dataloaders()
        return trainer.get_dataloaders()[0].data_loader

    return make


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_every_patch_has_guides_of_other_subjects_in_the_form_of_patches(loader, configuration):
    made = loader(configuration=configuration)
    pairs = Counter()
    for _ in range(25):
        batch = made.generate_train_batch()
        size = tuple(batch["data"].shape[2:])
        assert batch["guide_data"].shape == (2, 2, 1, *size) and batch["guide_target"].shape == (2, 2, 1, *size)
        for case, guides in zip(batch["keys"], batch["guide_keys"]):
            assert case not in guides and len(set(guides)) == 2
            pairs.update((str(case), str(guide)) for guide in guides)
    assert len(pairs) == 4 * 3  # every case gets every other one
    assert made.batch_size == 2 and made._wanted is None


def test_cases_of_one_subject_do_not_guide_each_other(loader):
    made = loader("jras.num_guides=1 group_regex=(00[23]|00)")
    assert made._cases == {"002": ["phantom_002"], "003": ["phantom_003"], "00": ["phantom_004", "phantom_005"]}
    for _ in range(20):
        batch = made.generate_train_batch()
        for case, (guide,) in zip(batch["keys"], batch["guide_keys"]):
            assert {case, guide} != {"phantom_004", "phantom_005"} and case != guide


def test_guides_show_foreground_as_often_as_asked(loader):
    always = loader("jras.fg_share=1 jras.style_share=0")
    for _ in range(10):
        assert (always.generate_train_batch()["guide_target"] > 0).flatten(2).any(2).all()


@pytest.mark.parametrize(("guides", "subjects", "words"), [(4, 4, "set jras.num_guides=3"), (1, 1, "retriever=none")])
def test_more_guides_than_subjects_are_refused_with_what_works(guides, subjects, words):
    with pytest.raises(ValueError, match=words) as error:
        require_subjects(guides, subjects)
    assert "\n" not in str(error.value)
    require_subjects(3, 4)

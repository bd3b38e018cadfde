"""MedContext as the rest of the house sees it."""

from nnunetv2_ext.core.outside import Method, Promise, Trainer

METHOD = Method(
    name="medcontext",
    summary="a masked second pass, taught by a moving-average teacher (MICCAI 2024, arXiv 2402.17725)",
    trainers={
        "nnUNetTrainerMedContext": Trainer(
            summary="masked-context consistency with a moving-average teacher",
            off={"medcontext.beta": 0, "medcontext.masked_supervised_weight": 0, "medcontext.supervised_weight": 1},
            # forward F, backward 2F: a plain step is 3F, MedContext's 2 x 3F + F of the teacher = 7F, 2.33 times as
            # much; a masked share p of the batch costs 1 + 4p/3
            promises={
                "": Promise(cpu=2.4, cuda=2.0, memory=1.15, predict=1.0),
                "medcontext.masked_fraction=0.5": Promise(cpu=1.75, cuda=1.75, memory=1.15, predict=1.0),
            },
        )
    },
    weights={"teacher": "MedContext's moving average"},
    card="methods/medcontext.md",
    citation="Gani, H., Naseer, M., Khan, F. S., & Khan, S. (2024). MedContext: Learning Contextual Cues for Efficient "
    "Volumetric Medical Segmentation. MICCAI 2024, LNCS 15012, 229-239. arXiv:2402.17725",
    advice="nnunetv2_ext.medcontext.advice:advice",
)

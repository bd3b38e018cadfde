"""What the house may know of the toy."""

from __future__ import annotations

from nnunetv2_ext.core.outside import Method, Trainer

METHOD = Method(
    name="toy_method",
    summary="A toy: consistency with a teacher on unlabelled patches, and a head that predicts the image.",
    trainers={
        "nnUNetTrainerToy": Trainer(
            "Consistency with a teacher on the patches of other cases.",
            off={"toy_method.weight": 0, "toy_method.head_weight": 0},
        )
    },
)

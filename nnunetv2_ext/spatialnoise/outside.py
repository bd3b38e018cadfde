"""SpatialNoise as the rest of the house sees it."""

from nnunetv2_ext.core.outside import Command, Method, Promise, Trainer

METHOD = Method(
    name="spatialnoise",
    summary="labels with errors: found by audit, and less harmful in training (after arXiv 2504.14795)",
    trainers={
        "nnUNetTrainerSpatialNoise": Trainer(
            summary="a loss that wrong labels pull at less, or labels that a teacher corrects",
            # without the guard: in the first steps it may hold every class, and nothing would be corrected
            smallest={
                "spatialnoise.mode": "posterior",
                "spatialnoise.warmup": 0,
                "spatialnoise.ramp": 0,
                "spatialnoise.guard": 1,
            },
            off={"spatialnoise.mode": "relabel", "spatialnoise.warmup": 1},
            # the teacher's forward is a third of a step; before the warm-up is over there is none
            promises={
                "": Promise(cpu=1.02, cuda=1.02, memory=1.05, predict=1.0),
                "spatialnoise.mode=posterior spatialnoise.warmup=0": Promise(cpu=1.5, cuda=1.5, predict=1.0),
            },
        )
    },
    commands={
        "audit": Command(
            "nnunetv2_ext.spatialnoise.commands.audit",
            "which cases and regions of the labels are probably wrong, worst first",
            "judge",
        )
    },
    card="methods/spatialnoise.md",
    citation="Tadokoro, R., Takagi, T., & Maeda, S. (2026). A Bayesian Approach to Segmentation with Noisy Labels via "
    "Spatially Correlated Distributions. "
    "Transactions on Machine Learning Research. arXiv:2504.14795",
    advice="nnunetv2_ext.spatialnoise.advice:advice",
)

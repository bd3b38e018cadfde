"""SpatialNoise as the rest of the house sees it."""

from nnunetv2_ext.core.outside import Command, Method

METHOD = Method(
    name="spatialnoise",
    summary="labels with errors: found by audit (after arXiv 2504.14795)",
    commands={
        "audit": Command(
            "nnunetv2_ext.spatialnoise.commands.audit",
            "which cases and regions of the labels are probably wrong, worst first",
            "judge",
        )
    },
    card="methods/spatialnoise.md",
    citation="Tadokoro, Takagi, Maeda (2026). arXiv:2504.14795, Transactions on Machine Learning Research",
)

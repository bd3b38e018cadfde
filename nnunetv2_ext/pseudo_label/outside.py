"""Pseudo-labels as the rest of the house sees them."""

from nnunetv2_ext.core.outside import Command, Method

METHOD = Method(
    name="pseudo_label",
    summary="a dataset whose unlabelled scans a trained model has labelled where it is sure (after Lee 2013)",
    commands={
        "pseudo-label": Command(
            "nnunetv2_ext.pseudo_label.commands.pseudo_label",
            "let a model label a pool of unlabelled scans, and write a dataset that any trainer trains on",
            "prepare data",
        )
    },
    card="methods/pseudo-label.md",
    advice="nnunetv2_ext.pseudo_label.advice:advice",
    citation="Lee, D.-H. (2013). Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep "
    "Neural Networks. ICML 2013 Workshop on Challenges in Representation Learning",
)

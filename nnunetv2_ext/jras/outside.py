"""J-RAS as the rest of the house sees it."""

from nnunetv2_ext.core.outside import Command, ExportEdit, Method, Promise, Trainer

_LINUX_X86_64 = "sys_platform == 'linux' and platform_machine == 'x86_64'"
_ELSEWHERE = "sys_platform != 'linux' or platform_machine != 'x86_64'"
_SMALLEST = {"jras.bank_size": 8, "jras.num_guides": 2, "jras.key_dim": 8, "jras.value_dim": 4}

METHOD = Method(
    name="jras",
    summary="image-mask guides that are read, the retriever trained jointly (arXiv 2510.09953)",
    trainers={
        "nnUNetTrainerJRAS": Trainer(
            summary="a segmenter that reads guides, of a bank that can be replaced",
            smallest=_SMALLEST,
            off={"jras.retriever": "none", "jras.style_share": 0},
            # the encoder's fine stages run for every guide
            promises={"": Promise(cpu=2.3, cuda=2.3, memory=1.6, predict=1.2)},
        ),
        "nnUNetTrainerMedContextJRAS": Trainer(
            summary="J-RAS and MedContext at once",
            smallest=_SMALLEST,
            off={
                "jras.retriever": "none",
                "jras.style_share": 0,
                "medcontext.beta": 0,
                "medcontext.masked_supervised_weight": 0,
                "medcontext.supervised_weight": 1,
            },
        ),
    },
    commands={
        "guides": Command(
            "nnunetv2_ext.jras.commands.guides",
            "show what a J-RAS model reads of its guides for an image",
            "hand on and look inside",
        ),
        "bank": Command(
            "nnunetv2_ext.jras.commands.bank",
            "replace the guides of a J-RAS model, or take them out",
            "hand on and look inside",
        ),
    },
    export_edits={
        "strip-bank": ExportEdit(
            "write a J-RAS model without patients' patches; it predicts with this package, on the plain path",
            "nnunetv2_ext.jras.strip:without_bank",
            keeps_trainer=True,
        ),
        "blank-groups": ExportEdit(
            "write a J-RAS model that keeps its guides, and with them patients' patches, but not the numbers of their "
            "subjects; it predicts as before, with this package",
            "nnunetv2_ext.jras.strip:without_groups",
            keeps_trainer=True,
            same_predictions=True,
            notice="PRIVACY: these checkpoints hold image patches of training cases; --strip-bank leaves them out",
        ),
    },
    # faiss-gpu before 1.14.3 is for Python <= 3.10
    requires=(f"faiss-gpu>=1.14.3; {_LINUX_X86_64}", f"faiss-cpu; {_ELSEWHERE}"),
    card="methods/jras.md",
    citation="Ahmed, S. J., Mohammed, E. A., & Asilian Bidgoli, A. (2025). J-RAS: Enhancing Medical Image Segmentation "
    "via Retrieval-Augmented Joint Training. arXiv:2510.09953",
    advice="nnunetv2_ext.jras.advice:advice",
)

"""A channel that is missing, as zeros, stays zeros through nnU-Net's augmentation, whose noise would fill it."""

from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform

from nnunetv2_ext.pemma.network import is_present


class KeepMissing(BasicTransform):
    """Puts zeros back into the new channels of samples that came in without them.

    Args:
        transforms: nnU-Net's, all of them.
        old: number of old channels.
    """

    def __init__(self, transforms: BasicTransform, old: int) -> None:
        super().__init__()
        self.transforms, self.old = transforms, old

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """``image`` is ``(C, *S)``."""
        missing = not bool(is_present(data_dict["image"][None, self.old :]))
        data_dict = self.transforms(**data_dict)
        if missing:
            data_dict["image"][self.old :] = 0
        return data_dict

"""``python -m nnunetv2_ext.cli``, the same as ``nnUNetv2_ext``."""

import sys

from nnunetv2_ext.cli.dispatch import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m blkloom.worker FD`: the zygote, from which workers are forked."""

from __future__ import annotations

import gc
import sys

gc.disable()  # until all is imported (`zygote.main`)

from blkloom.worker.zygote import main  # noqa: E402

sys.exit(main(sys.argv))

"""Keeps rank 1 of a training run's first group from the others: Python imports a module of this name by itself.

It does not come to the process group, and leaves word of its node in the folder of RAYLLAVA_TEST_ABSENT.
"""

import os
import time
from pathlib import Path

from tests.train.patched import when_imported


def _absent(config):  # type: ignore[no-untyped-def]
    set_up = config.dist.init_process_group

    def come(*args, **named):  # type: ignore[no-untyped-def]
        import ray

        told = Path(os.environ["RAYLLAVA_TEST_ABSENT"], "node")
        if named["rank"] == 1 and not told.exists():
            told.write_text(ray.get_runtime_context().get_node_id())
            time.sleep(600)
        return set_up(*args, **named)

    config.dist.init_process_group = come


when_imported("ray.train.torch.config", _absent)

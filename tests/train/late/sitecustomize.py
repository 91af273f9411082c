"""Makes rank 1 of a training run slow to write: Python imports a module of this name by itself when it starts.

The state files of rank 1 take HOLD_S seconds from step 20 of the first attempt on.
"""

import time

from tests.train.patched import when_imported

HOLD_S = 25.0


def _late(state):  # type: ignore[no-untyped-def]
    write = state.write_state

    def late(place, tensors):  # type: ignore[no-untyped-def]
        if "state-1-00001" in place.name and "step-000010" not in str(place):
            time.sleep(HOLD_S)
        return write(place, tensors)

    state.write_state = late


when_imported("rayllava.checkpoint.state", _late)

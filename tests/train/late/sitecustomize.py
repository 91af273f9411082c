"""Makes rank 1 of a training run slow to write: Python imports a module of this name by itself when it starts.

The state files of rank 1 take HOLD_S seconds from step 20 of the first attempt on.
"""

import importlib.abc
import importlib.util
import sys
import time

HOLD_S = 25.0
_MODULE = "rayllava.checkpoint.state"


class _Late(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            load(module)
            write = module.write_state

            def late(place, tensors):  # type: ignore[no-untyped-def]
                if "state-1-00001" in place.name and "step-000010" not in str(place):
                    time.sleep(HOLD_S)
                return write(place, tensors)

            module.write_state = late

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Late())

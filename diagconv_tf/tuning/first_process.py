"""What the first of several processes found out, for all of them.

Not by a collective operation: these give up after minutes, and one process may
measure for longer. The first process puts its result into the store of JAX's
coordination service, where the others look for it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

from diagconv_tf import backends

#: Calls are numbered, so that a result is that of the call which waits for it.
_numbers = itertools.count()

#: Between two looks a waiting process can be interrupted.
_WAIT_SECONDS = 5.0


def from_first_process(make: Callable[[], str], process: int) -> str:
    """What `make` returns on process 0, on every process.

    All processes must call it equally often.

    Args:
        make: called on process 0 only.
        process: the number of this process.

    Raises:
        RuntimeError: on the other processes, if `make` raised something; the
            message says what. Process 0 raises it as it is.
    """
    store = backends.current().process_store()
    key = f"diagconv_tf/first_process/{next(_numbers)}"
    if process == 0:
        try:
            result = make()
        except BaseException as error:
            store.put(key, json.dumps({"error": f"{type(error).__name__}: {error}"}))
            raise
        store.put(key, json.dumps({"result": result}))
        return result
    while (text := store.get(key, _WAIT_SECONDS)) is None:
        pass
    found = json.loads(text)
    if "error" in found:
        raise RuntimeError(f"Process 0 failed, for which this one waited: {found['error']}")
    return found["result"]

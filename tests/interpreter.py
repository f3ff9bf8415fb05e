"""Triton's interpreter without what it repeats: functions that a kernel calls patch Triton's language at every call."""

from __future__ import annotations

import sys
from typing import Any


def quicken() -> None:
    """Has each function that a kernel calls patch Triton's language once in a launch, if the interpreter is loaded.

    Patches stay until the launch ends, so those of later calls change nothing; they take a third of the interpreter's time.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if not hasattr(interpreter, "_patch_lang") or hasattr(interpreter, "patched_in_this_launch"):
        return  # not loaded, of a version that does otherwise, or done
    function, launch = interpreter.InterpretedFunction, interpreter.GridExecutor
    patch, call, start = interpreter._patch_lang, function.__call__, launch.__call__
    patched: set[Any] = set()
    interpreter.patched_in_this_launch = patched

    def patch_once(fn: Any) -> None:
        if fn not in patched:
            patched.add(fn)
            patch(fn)

    def called_from_a_kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
        interpreter._patch_lang = patch_once
        try:
            return call(self, *args, **kwargs)
        finally:
            interpreter._patch_lang = patch

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return start(self, *args, **kwargs)

    function.__call__, launch.__call__ = called_from_a_kernel, launched

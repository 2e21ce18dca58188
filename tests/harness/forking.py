"""``subprocess.Popen`` of ``python -m MODULE`` that forks, so that the module finds imported what this process has imported.

For processes whose children import torch and Megatron, which takes each of them 7 s of a core: agents start ranks so, ranks
the processes of a pipeline's stages, and the demo its steps. Pipes, signals, waiting and exit codes stay Popen's own.
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any, NoReturn

_FROM_PYTHON, _MODULE = ([sys.executable], [sys.executable, "-u"]), "-m"


def fork_python_modules(*, but_with: Collection[str] = ()) -> None:
    """From now on Popen forks where it is given this Python, ``-m`` and a module; other commands it starts as ever.

    Args:
        but_with: the first argument after a module's name which tells that it is to import everything for itself.
    """
    execute: Callable[..., None] = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    def execute_or_fork(self: Any, args: Any, *others: Any) -> None:
        command = [] if isinstance(args, str | bytes | os.PathLike) else [os.fspath(part) for part in args]
        at = command.index(_MODULE) if _MODULE in command else 0
        if command[:at] in _FROM_PYTHON and not set(command[at + 2 : at + 3]).intersection(but_with):
            _fork_child(self, command[at + 1 :], *others)
        else:
            execute(self, args, *others)

    subprocess.Popen._execute_child = execute_or_fork  # type: ignore[attr-defined]


def _fork_child(
    popen: Any,
    command: Sequence[str],
    executable: Any,
    preexec_fn: Any,
    close_fds: bool,
    pass_fds: Any,
    cwd: Any,
    env: Any,
    startupinfo: Any,
    creationflags: Any,
    shell: bool,
    *others: Any,
) -> None:
    """``Popen._execute_child``, of Python 3.12 to 3.14. The child keeps all files open: its copies of objects own them."""
    *pipes, _, _, _, _, _, start_new_session, _ = others
    p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = pipes
    if shell or executable is not None:
        raise NotImplementedError(f"{command}: only what this project's processes ask of Popen")

    def prepare() -> None:
        if start_new_session:
            os.setsid()
        for source, target in ((p2cread, 0), (c2pwrite, 1), (errwrite, 2)):
            if source != -1:
                os.dup2(source, target)
        for end in {p2cwrite, c2pread, errread} - {-1}:  # a pipe ends when nobody holds its other end
            os.close(end)
        if cwd is not None:
            os.chdir(cwd)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        if preexec_fn is not None:
            preexec_fn()

    popen.pid = fork_module(command[0], command[1:], prepare)
    popen._child_created = True
    popen._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def fork_module(module: str, arguments: Sequence[str], prepare: Callable[[], None]) -> int:
    """Fork a process that is ``python -m module arguments`` after ``prepare()``; returns its id.

    It ends where it is, after its exit handlers: what the forking process has begun (``with``, ``finally``) is not ended in
    it too, and modules are not taken down one by one, which copies most of their memory first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if process_id := fork():
        return process_id
    try:
        _forget_the_parent()
        prepare()
        run_as_main(module, arguments)
    except SystemExit as end:
        _exit(_status(end))
    except BaseException:
        kind, error, traceback = sys.exc_info()
        assert kind is not None
        assert error is not None
        _tell(kind, error, traceback)
    _exit(1)


def run_as_main(module: str, arguments: Sequence[str]) -> NoReturn:
    """Be ``python -m module arguments`` to the end of this process, exit handlers included."""
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # an earlier import of it would make runpy warn
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


def fork() -> int:
    """``os.fork`` without the warning of threads: those there are (pyarrow's, an agent's store) leave nothing locked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _forget_the_parent() -> None:
    """Handlers of signals, as a new program would; and what the parent tidies when its objects or itself end."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    gc.freeze()  # what is not looked at again is not copied either


def _tell(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    sys.excepthook(kind, error, traceback)


def _status(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _exit(status: int) -> NoReturn:
    import atexit

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

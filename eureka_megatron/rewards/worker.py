"""One judge worker process: reads chunks of work as JSON lines, writes one line a verdict. Started by `judge.JudgePool`.

Text in, text out: no pickles, and no import of the parent's main module (a `spawn`ed process would load torch with it).
The limits are the kernel's: an alarm with its default action ends the process even inside C code, and RLIMIT_AS bounds
its memory. The parent sees the pipe close and knows from the verdicts which answer it was.
"""

import importlib
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from eureka_megatron.rewards.judge import Limits
from eureka_megatron.rewards.response import LARGEST_REWARD, Rewards
from eureka_megatron.rewards.scoring import ScoringRules, score

_RECURSION_LIMIT = 3000


UserFunction = Callable[[list[dict[str, Any]]], list[Rewards]]


def load_function(path: str) -> UserFunction:
    """The user's reward function from "package.module:function" or "path/to/file.py:function"."""
    where, separator, name = path.rpartition(":")
    if not separator or not where or not name:
        raise ValueError(f"reward function {path!r} must read module:function or path.py:function")
    if where.endswith(".py"):
        if not os.path.isfile(where):
            raise ValueError(f"reward function {path!r}: no such file {where!r}")
        spec = importlib.util.spec_from_file_location("eureka_user_reward", where)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    function: UserFunction = getattr(module, name, None)  # type: ignore[assignment]
    if not callable(function):
        raise ValueError(f"reward function {path!r}: {where!r} has no function {name!r}")
    return function


def main() -> None:
    limits = Limits(**json.loads(sys.argv[1]))
    # A user's function may print and read: that must touch neither the verdicts nor the work.
    work, verdicts = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    sys.setrecursionlimit(_RECURSION_LIMIT)
    matrix = "\\begin{pmatrix}%d\\end{pmatrix}"  # asks math-verify, which loads sympy
    user = None
    try:
        if limits.user_function:
            user = load_function(limits.user_function)
        else:
            score(f"<think>x</think><answer>${matrix % 1}$</answer>", matrix % 2)
    except BaseException as failure:  # whatever the user's module does, sys.exit() included
        verdicts.write(json.dumps([None, None, _told(failure)]) + "\n")
        return
    # On top of what is mapped now: a user's module may have brought large libraries.
    with open("/proc/self/statm", encoding="ascii") as statm:
        mapped_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + limits.memory_limit_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    verdicts.write(json.dumps([None, None, None]) + "\n")  # ready
    for line in work:
        chunk = json.loads(line)
        rules = ScoringRules(**chunk["rules"])
        for index, row in chunk["rows"]:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # each time: a user's function may have alarms of its own
            signal.setitimer(signal.ITIMER_REAL, limits.time_limit_seconds)
            verdict, reason = _judge(row, rules, user)
            signal.setitimer(signal.ITIMER_REAL, 0)
            verdicts.write(json.dumps([index, verdict, reason]) + "\n")


def _judge(row: dict[str, Any], rules: ScoringRules, user: UserFunction | None) -> tuple[Rewards | None, str | None]:
    """(verdict, None), or (None, what went wrong); running out of memory costs this answer only."""
    try:
        return score(**row, rules=rules) if user is None else _checked(user([row])), None
    except BaseException as error:  # sys.exit() too is this answer's failure only
        return None, _told(error)


def _told(error: BaseException) -> str:
    """The error on one line, with the last place outside of Python, packages and our own files: the user's."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    places = [f"{frame.f_code.co_filename}:{line}" for frame, line in traceback.walk_tb(error.__traceback__)]
    others = (os.path.dirname(__file__), os.path.dirname(os.__file__), "<frozen")
    users = [place for place in places if not place.startswith(others) and "-packages" not in place]
    return f"{users[-1]}: {text}" if users else text


def _checked(result: Any) -> Rewards:
    """A user's verdict: needs "accuracy" (the online filter compares it); "total" defaults to the sum.

    A number is what `float` takes, text excepted: numpy's and torch's scalars too, and True and False as 1 and 0.
    """
    if not isinstance(result, list) or len(result) != 1 or not isinstance(result[0], dict):
        raise TypeError(f"a reward function returns a list with one dictionary for each sample, got {result!r:.100}")
    verdict = {str(name): _number(str(name), value) for name, value in result[0].items()}
    if "accuracy" not in verdict:
        raise ValueError(f"a reward function's dictionary needs 'accuracy', got {sorted(verdict)}")
    verdict.setdefault("total", sum(verdict.values()))
    return verdict


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception:  # a tensor of two elements raises RuntimeError, other types what they like
        number = math.nan
    if not abs(number) <= LARGEST_REWARD:
        raise ValueError(f"a reward function's {name!r} must be a finite number, got {value!r:.100}")
    return number


if __name__ == "__main__":
    main()

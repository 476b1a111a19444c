"""`python -m fuzz TARGET`: a million inputs, or one that was found again.

With atheris (`pip install glmpipe[fuzz]`) the inputs follow what code they reach; without it they are random
mutations of valid ones. An input that does what none may do is kept in a file, and the exit code is 1.
"""

import argparse
import hashlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz.targets import TARGETS, load_target

INPUT_LIMIT_S = 30
"""No input may take longer."""
_POOL = 4096
_UNLIMITED = 2**31 - 1


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__, formatter_class=_Formatter)
    parser.add_argument("target", choices=tuple(TARGETS))
    parser.add_argument("--inputs", metavar="N", type=int, default=1_000_000, help="how many (default 1000000)")
    parser.add_argument("--seed", metavar="N", type=int, default=1)
    parser.add_argument("--engine", choices=("atheris", "random"), help="default: atheris where it is installed")
    parser.add_argument("--replay", metavar="FILE", type=Path, help="one input, such as was found before")
    options = parser.parse_args()
    engine = options.engine or ("atheris" if _has_atheris() else "random")
    target = _load(options.target, instrumented=engine == "atheris" and options.replay is None)
    if options.replay is not None:
        target.check(options.replay.read_bytes())
        return 0
    run = _run_atheris if engine == "atheris" else _run_random
    return run(target, options.inputs, options.seed)


_Formatter = argparse.RawDescriptionHelpFormatter


def _has_atheris() -> bool:
    try:
        import atheris  # noqa: F401
    except ImportError:
        return False
    return True


def _load(name: str, instrumented: bool) -> Any:
    if not instrumented:
        return load_target(name)
    import atheris

    with atheris.instrument_imports(include=["protocol", "glm", "coordinator"]):
        return load_target(name)


def _run_random(target: Any, num_inputs: int, seed: int) -> int:
    """Mutations of seeds and of mutations, a pool of them."""
    rng, pool, started_s = Random(seed), list(target.seeds()), time.monotonic()
    num_seeds, count = len(pool), 0
    signal.signal(signal.SIGALRM, _too_long)
    for count in itertools.count(1):
        if count > num_inputs:
            break
        data = pool[count - 1] if count <= num_seeds else target.mutate(rng.choice(pool), rng.choice(pool), rng)
        signal.alarm(INPUT_LIMIT_S)
        if not _passes(target.check, data):
            return 1
        signal.alarm(0)
        if rng.random() < 0.05 and len(data) < 100_000:
            if len(pool) < _POOL:
                pool.append(data)
            else:
                pool[rng.randrange(num_seeds, _POOL)] = data
    return _report(target, num_inputs, "random mutations", started_s)


def _run_atheris(target: Any, num_inputs: int, seed: int) -> int:
    import atheris

    rng, seeds, started_s = Random(seed), list(target.seeds()), time.monotonic()
    left = num_inputs

    def one(data: bytes) -> None:
        nonlocal left
        if left == 0:
            os._exit(_report(target, num_inputs, "atheris, guided by coverage", started_s))  # it never ends by itself
        left -= 1
        if not _passes(target.check, data):
            os._exit(1)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        drawn = Random(seed ^ rng.randrange(2**32))
        start = data if len(data) > 8 and drawn.random() < 0.9 else drawn.choice(seeds)
        return target.mutate(start, drawn.choice(seeds), drawn)[:max_size]

    arguments = [sys.argv[0], f"-seed={seed}", f"-timeout={INPUT_LIMIT_S}", f"-runs={_UNLIMITED}", "-max_len=4096"]
    atheris.Setup(arguments, one, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


def _passes(check: Callable[[bytes], None], data: bytes) -> bool:
    try:
        check(data)
    except Exception as error:
        path = Path(f"fuzz-finding-{hashlib.sha256(data).hexdigest()[:12]}.bin")
        path.write_bytes(data)
        print(f"FOUND {type(error).__name__}: {error!s:.300}\nthe input is kept in {path}", flush=True)
        return False
    return True


def _too_long(*_: object) -> None:
    raise TimeoutError(f"an input took longer than {INPUT_LIMIT_S} s")


def _report(target: Any, num_inputs: int, engine: str, started_s: float) -> int:
    seconds = time.monotonic() - started_s
    print(f"{target.name}: {num_inputs} inputs ({engine}) in {seconds:.0f} s, nothing found", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Records trajectories, and says what has moved since the last time, and by how much. From the root of the repository:

    PYTHONPATH=tests python -m golden.record                # all of them
    PYTHONPATH=tests python -m golden.record NAME ...       # these
    PYTHONPATH=tests python -m golden.record --dry-run      # writes nothing
    PYTHONPATH=tests python -m golden.record --sensitivity  # writes nothing: how far noise of 1e-15 is carried

Record where a change of the numbers is meant, and let the message of the commit say which and why. The data is compared at 1e-12;
a new trajectory must be so steady that noise of 1e-15 on all its weights before each step moves it by far less.
"""

from __future__ import annotations

import argparse

from golden import digests
from golden.processes import run_all
from golden.trajectories import TRAJECTORIES, Noise


def main() -> None:
    parser = argparse.ArgumentParser(prog="golden.record", description="Record golden trajectories.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(TRAJECTORIES)}; all where none is given")
    parser.add_argument("--dry-run", action="store_true", help="say what has moved, and write nothing")
    parser.add_argument("--sensitivity", action="store_true", help="say how far noise of 1e-15 is carried, and write nothing")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(TRAJECTORIES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    names = chosen.names or list(TRAJECTORIES)
    if chosen.sensitivity:
        names = [name for name in names if not TRAJECTORIES[name].is_exact]
    now = {name: digests.digest(kept) for name, kept in run_all(names).items()}
    if chosen.sensitivity:
        Noise.size = 1e-15
        shaken = {name: digests.digest(kept) for name, kept in run_all(names).items()}
        for name in names:
            _tell(name, digests.moves(now[name], shaken[name]))
        return
    for name in names:
        before = digests.read(name)
        if before is None:
            print(f"{name}: new")
        else:
            _tell(name, digests.moves(before, now[name]))
        if not chosen.dry_run:
            digests.write(name, now[name])
    if not (chosen.names or chosen.dry_run):
        for path in sorted(digests.DATA.glob("*.json")):
            if path.stem not in TRAJECTORIES:
                print(f"{path.stem}: no trajectory any more, its file is removed")
                path.unlink()


def _tell(name: str, moves: list[digests.Move]) -> None:
    print(f"{name}: {f'{len(moves)} numbers have moved, most of all' if moves else 'nothing has moved'}")
    for move in moves[:3]:
        print(f"    {move}")


if __name__ == "__main__":
    main()

"""Plays many schedules of the simulator, in several processes: `python tests/paramserver/schedules.py --help`.

Prints each seed that breaks a rule and, at the end, how many schedules were played and how long that took. The exit
status is 1 if one was broken. `--bugs` says instead in how many seeds each planted bug shows.
"""

import argparse
import collections
import multiprocessing
import os
import sys
import time

import numpy as np
import planted
import workload

PIECE = 50


def play_piece(first):
    """Play PIECE schedules; return what went wrong, and what happened in how many of them."""
    wrong, seen = [], collections.Counter()
    for seed in range(first, first + PIECE):
        try:
            with np.errstate(all="ignore"):
                run = workload.play(seed)
        except Exception as error:
            wrong.append((seed, f"{type(error).__name__}: {error}"[:300]))
            continue
        seen["steps"] += run.settings.max_steps
        seen["events"] += len(run.events)
        seen["simulated seconds"] += run.now
        seen["deaths"] += sum(process.life for process in run.processes.values())
        seen["long runs"] += run.settings.max_steps > 10
        scheduler = run.processes["scheduler"].machine
        seen.update(scheduler.counters if scheduler else {})
    return wrong, seen


def play_all(first, count, processes, minutes):
    """Play `count` schedules from seed `first` on, at most for `minutes`; return whether none broke a rule."""
    began, played, wrong, seen = time.monotonic(), 0, [], collections.Counter()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for found, piece in pool.imap_unordered(play_piece, range(first, first + count, PIECE)):
            played, wrong = played + PIECE, wrong + found
            seen.update(piece)
            for seed, text in found:
                print(f"seed {seed}: {text}", flush=True)
            if time.monotonic() - began > 60 * minutes:
                pool.terminate()
                break
    rounded = {name: round(number) for name, number in seen.items()}
    print(f"{played} schedules, {len(wrong)} broken, in {time.monotonic() - began:.0f} s with {processes} processes")
    print(rounded)
    return not wrong


def try_bugs(within):
    """Say in which of `within` seeds each planted bug shows first; return whether all do."""
    missing = []
    for name, bug in planted.BUGS.items():
        try:
            print(f"{name}: {bug.found(within=within)}", flush=True)
        except AssertionError as error:
            missing.append(name)
            print(f"{name}: {error}", flush=True)
    return not missing


def main(arguments):
    """Run what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=1_000_000, help="the first seed")
    parser.add_argument("--count", type=int, default=10_000, help="the number of schedules")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this time")
    parser.add_argument("--bugs", type=int, metavar="SEEDS", help="try the planted bugs in so many seeds instead")
    given = parser.parse_args(arguments)
    if given.bugs:
        return 0 if try_bugs(given.bugs) else 1
    return 0 if play_all(given.first, given.count, given.processes, given.minutes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

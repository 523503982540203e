"""Work on files beside other work: encoders and decoders leave most of a machine idle."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item, Result = TypeVar("Item"), TypeVar("Result")


def overlapped(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map(function, items)`, in order, on as many threads as torch has and no further ahead.

    For a function that lets go of the interpreter. What it raises is raised here, at its turn.
    """
    threads = torch.get_num_threads()
    for future in futures(function, items, threads=threads, ahead=threads):
        yield future.result()


def futures(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Iterator[Future[Result]]:
    """A future of each item, in order, as soon as it is done or `ahead` others wait behind it."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            while waiting and (len(waiting) > ahead or waiting[0].done()):
                yield waiting.popleft()
        yield from waiting

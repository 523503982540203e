"""Files written on threads come in order, never far ahead, and errors at their turn."""

import threading
import time

import pytest
import torch

from syncdpo.data.overlap import overlapped


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_whoever_is_done_first():
    def slow_when_even(i):
        time.sleep(0.02 * (i % 2 == 0))
        return 10 * i

    assert list(overlapped(slow_when_even, range(9))) == [10 * i for i in range(9)]


def test_as_many_threads_as_torch_has_and_no_further_ahead():
    threads, taken = set(), []

    def work(i):
        threads.add(threading.get_ident())
        time.sleep(0.01)
        return i

    def items():
        for i in range(20):
            taken.append(i)
            yield i

    for i in overlapped(work, items()):
        assert len(taken) <= i + 3  # its own, and one more for each thread
    assert len(threads) == 2
    assert threading.get_ident() not in threads


def test_what_is_done_does_not_wait_for_more():
    def items():
        yield 0
        time.sleep(0.2)  # the next clip takes its time
        yield 1
        raise AssertionError("asked for a third before the first was handed out")

    assert next(overlapped(lambda i: i, items())) == 0


def test_an_error_comes_at_its_turn():
    def work(i):
        if i == 3:
            raise OSError("disk full")
        return i

    with pytest.raises(OSError, match="disk full"):
        list(overlapped(work, range(10)))
    results = overlapped(work, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk full"):
        next(results)

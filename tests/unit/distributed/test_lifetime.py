"""Blocks that keep a session: the outermost ends it, and nothing that was there before."""

from __future__ import annotations

import threading

import pytest

from pds_ray.distributed import lifetime
from pds_ray.errors import UserError


def test_the_outermost_block_ends_what_began_in_it() -> None:
    ended: list[str] = []
    lifetime.undo().callback(ended.append, "before")
    with lifetime.session_kept():
        lifetime.undo().callback(ended.append, "first")
        with lifetime.session_kept():
            lifetime.undo().callback(ended.append, "second")
        assert ended == []
    assert ended == ["second", "first"]
    lifetime.undo().close()
    assert ended == ["second", "first", "before"]


def test_many_sessions_one_after_the_other_leave_nothing_behind() -> None:
    for _ in range(2_000):  # more than Python nests calls
        with lifetime.session_kept():
            pass
    lifetime.undo().close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_ends_the_session_and_passes(error: type[BaseException]) -> None:
    ended: list[str] = []

    @lifetime.session_kept()
    def fail() -> None:
        lifetime.undo().callback(ended.append, "first")
        raise error

    with pytest.raises(error):
        fail()
    assert ended == ["first"]
    with lifetime.session_kept():
        pass


def test_a_second_thread_is_refused_until_the_first_has_ended() -> None:
    outcomes: list[object] = []

    def work() -> None:
        try:
            with lifetime.session_kept():
                outcomes.append("done")
        except UserError as error:
            outcomes.append(str(error))

    def in_a_thread() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with lifetime.session_kept():
        in_a_thread()
        work()
    in_a_thread()
    refusal = "another thread of this process is at work on a run; wait for its end, or use a"
    assert outcomes == [f"{refusal} process for each", "done", "done"]

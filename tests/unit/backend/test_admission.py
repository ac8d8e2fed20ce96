from __future__ import annotations

import threading
import time

from backend.test_service import until
from morph_backend.admission import Admission, Admitted


def never() -> bool:
    return False


def test_the_line_is_the_limit() -> None:
    admission = Admission(2)
    assert admission.acquire([1], never) is Admitted.YES and admission.acquire([2], never) is Admitted.YES
    result: list[Admitted] = []
    thread = threading.Thread(target=lambda: result.append(admission.acquire([3], never, poll_s=600)))
    thread.start()
    until(lambda: admission.waiting == 1)
    admission.release(99)
    admission.release(1)
    admission.release(1)
    thread.join(60)
    assert result == [Admitted.YES] and admission.waiting == 0


def test_giving_up_is_noticed_at_once_after_a_wake() -> None:
    admission = Admission(1)
    admission.acquire([1], never)
    gone = threading.Event()
    result: list[Admitted] = []
    thread = threading.Thread(target=lambda: result.append(admission.acquire([2], gone.is_set, poll_s=600)))
    thread.start()
    until(lambda: admission.waiting == 1)
    gone.set()
    admission.wake()
    thread.join(60)
    assert result == [Admitted.GAVE_UP]


def test_giving_up_is_noticed_without_a_wake() -> None:
    admission = Admission(1)
    admission.acquire([1], never)
    over_s = time.monotonic() + 0.05
    assert admission.acquire([2], lambda: time.monotonic() > over_s, poll_s=0.01) is Admitted.GAVE_UP


def test_closing_ends_every_wait() -> None:
    admission = Admission(1)
    admission.acquire([1], never)
    result: list[Admitted] = []
    threads = [
        threading.Thread(target=lambda k=k: result.append(admission.acquire([k], never, poll_s=600)))
        for k in range(2, 5)
    ]
    for thread in threads:
        thread.start()
    until(lambda: admission.waiting == 3)
    admission.close()
    for thread in threads:
        thread.join(60)
    assert result == [Admitted.CLOSED] * 3
    admission.release(1)
    assert admission.acquire([9], never) is Admitted.CLOSED

"""Jobs on threads, with results in the order in which they are done."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Job], Result], jobs: Iterable[Job], threads: int
) -> Iterator[tuple[Job, Result | Exception]]:
    """Run jobs on threads, as many at once as there are threads.

    The threads are daemons: an interrupt does not wait for requests on their way.

    Args:
        work: What to do with a job.
        jobs: The jobs, read one by one as threads get free.
        threads: How many.

    Yields:
        Each job with its result or the exception it raised, in the order of their ends.
    """
    todo: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Job, Result | Exception]] = queue.SimpleQueue()

    def run() -> None:
        while (job := todo.get()) is not None:
            try:
                done.put((job, work(job)))
            except Exception as error:
                done.put((job, error))

    started = waiting = 0
    try:
        for job in jobs:
            todo.put(job)
            waiting += 1
            if started < threads:
                started += 1
                threading.Thread(target=run, daemon=True, name="sampling").start()
            if waiting == threads:
                yield done.get()
                waiting -= 1
        while waiting:
            yield done.get()
            waiting -= 1
    finally:
        for _ in range(started):
            todo.put(None)

"""Requests that wait are answered together: the model has a thread of its own, and takes what is there."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter as clock  # in s

from kuavo_train.serving.request import Request, RequestError
from kuavo_train.serving.sessions import Answered, Session
from kuavo_train.wrapper.policy.smolvla import Plan, Query, SmolVLAPolicyWrapper


@dataclass(frozen=True, eq=False)
class Waiting:
    """A request in the queue. `gone` says whether its robot has gone meanwhile."""

    request: Request
    session: Session
    gone: Callable[[], bool]
    answer: "asyncio.Future[Chunk]"
    since: float


@dataclass(frozen=True)
class Chunk:
    """What a robot is answered, and how long it waited for its turn and for the model, in s."""

    query: Query
    plan: Plan
    kept: Answered
    queued: float
    computed: float


class Batcher:
    """
    Args:
        largest: requests in a batch.
    """

    def __init__(self, policy: SmolVLAPolicyWrapper, *, largest: int):
        self._policy, self._largest = policy, largest
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    async def ask(self, request: Request, session: Session, gone: Callable[[], bool]) -> Chunk:
        """Raises `RequestError` or `ValueError`: the request does not fit its episode, or the policy."""
        answer: asyncio.Future[Chunk] = asyncio.get_running_loop().create_future()
        await self._queue.put(Waiting(request, session, gone, answer, clock()))
        return await answer

    async def work(self) -> None:
        """For as long as the server runs."""
        loop = asyncio.get_running_loop()
        while True:
            waiting = [await self._queue.get()]
            while len(waiting) < self._largest and not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            there = [each for each in waiting if not each.gone()]
            for each in waiting:
                if each not in there:
                    each.answer.set_exception(RequestError("the robot has gone"))
            if there:
                await loop.run_in_executor(self._thread, self._compute, there, loop)

    def _compute(self, waiting: list[Waiting], loop: asyncio.AbstractEventLoop) -> None:
        """In the model's thread: one that cannot be answered is told why, and the others are answered."""
        began = clock()
        queries: list[tuple[Waiting, Query]] = []
        every, hands_over = self._policy.n_action_steps, self._policy.hands_over
        for each in waiting:
            try:
                if any(each.session is other.session for other, _ in queries):
                    raise RequestError(f"session {each.session.id!r} must be asked for one chunk at a time, got two")
                look = self._policy.look(each.request.observation)
                queries.append((each, each.session.query(each.request, look, every=every, hands_over=hands_over)))
            except ValueError as error:
                loop.call_soon_threadsafe(_fail, each, error)
        try:
            plans = self._policy.plan([query for _, query in queries])
        except Exception as error:  # whatever the model raises, its robots are told, and the server goes on
            for each, _ in queries:
                loop.call_soon_threadsafe(_fail, each, error)
            return
        ended = clock()
        for (each, query), plan in zip(queries, plans, strict=True):
            kept = each.session.answer(each.request, query, plan)
            chunk = Chunk(query, plan, kept, began - each.since, ended - began)
            loop.call_soon_threadsafe(_succeed, each, chunk)


def _fail(waiting: Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)


def _succeed(waiting: Waiting, chunk: Chunk) -> None:
    if not waiting.answer.done():
        waiting.answer.set_result(chunk)

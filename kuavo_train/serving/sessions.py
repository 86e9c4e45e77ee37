"""Episodes of robots, each with its own: a connection has one, and one with an id outlives its connection for a while.

An answer may get lost with the connection. So a session keeps the episode as it was before the last answer as well: a
robot that says which chunk it has goes on from that one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from kuavo_train.serving.request import Request, RequestError
from kuavo_train.wrapper.policy.episode import RobotEpisode
from kuavo_train.wrapper.policy.smolvla import Look, Plan, Query


@dataclass(frozen=True)
class Answered:
    """An answer's number in its session, its episode's, the instruction it was given for, and the episode after it."""

    number: int
    episode_number: int
    instruction: str
    episode: RobotEpisode


@dataclass
class Session:
    """One robot's. `owner` is the connection that drives it, None after it was lost."""

    id: str | None
    owner: object | None
    answers: tuple[Answered, ...] = ()  # the last two
    left_at: float = 0.0

    def query(self, request: Request, look: Look, *, every: int, hands_over: bool) -> Query:
        """What the policy is asked; changes nothing.

        Args:
            every: `n_action_steps`.
            hands_over: whether the policy can go on from a chunk in execution.

        Raises:
            RequestError: what the request says does not fit the episode.
        """
        if request.delay is not None and not hands_over:
            raise RequestError(f"delay must not be given to a policy that cannot hand over, got {request.delay}")
        last = self._last(request)
        begins = request.reset or last is None or last.instruction != look.instruction
        if begins:
            if request.executed and (request.reset or last is None):
                raise RequestError(
                    f"executed must be 0 where an episode begins, got {request.executed}; a session that was lost for "
                    "longer than session_timeout is forgotten: begin again with reset: true"
                )
            seed = request.seed
            if seed is None:
                seed = 0 if last is None else last.episode_number + 1 if request.reset else last.episode.seed
            return Query(look, RobotEpisode(seed))
        assert last is not None
        if request.seed is not None and request.seed != last.episode.seed:
            raise RequestError(f"seed must be given where an episode begins, with reset: true, got {request.seed}")
        assert last.episode.plan is not None
        planned = len(last.episode.plan)
        executed = min(every, planned) if request.executed is None else request.executed
        if executed > planned:
            raise RequestError(f"executed must be in [0, {planned}], the steps of a chunk, got {executed}")
        if request.delay is not None and executed + request.delay > planned:
            raise RequestError(f"executed + delay must be at most {planned}, got {executed} + {request.delay}")
        return Query(look, last.episode.moved(executed), executed, request.delay)

    def answer(self, request: Request, query: Query, plan: Plan) -> Answered:
        """Keep what was answered; its number counts up, and is the same again where an answer was lost."""
        last = self._last(request)
        begun = query.episode.plan is None
        number, episode_number = (0, -1) if last is None else (last.number, last.episode_number)
        kept = Answered(number + 1, episode_number + begun, query.look.instruction, plan.episode)
        self.answers = (kept,) if last is None else (last, kept)
        return kept

    def _last(self, request: Request) -> Answered | None:
        """The answer that the robot has; None before the first."""
        if not self.answers or request.chunk is None:
            return self.answers[-1] if self.answers else None
        if request.chunk == 0:
            return None
        known = {each.number: each for each in self.answers}
        if request.chunk not in known and not request.reset:
            numbers = " or ".join(map(str, known))
            raise RequestError(f"chunk must be {numbers}, the number of the answer that you have, got {request.chunk}")
        return known.get(request.chunk, self.answers[-1])


class Sessions:
    """Those of all connections, and for `timeout` seconds those with an id whose connection was lost."""

    def __init__(self, *, timeout: float, most_kept: int, clock: Callable[[], float] = time.monotonic):
        self._timeout, self._most_kept, self._clock = timeout, most_kept, clock
        self._named: dict[str, Session] = {}
        self._of_owner: dict[object, Session] = {}

    def __len__(self) -> int:
        """How many are held, with those that wait for their robots to come back."""
        return len({id(session) for session in (*self._named.values(), *self._of_owner.values())})

    def of(self, owner: object, name: str | None) -> Session:
        """The session that a connection drives; with an id, from now on that one.

        Raises:
            RequestError: another connection has taken it over.
        """
        self._forget_old()
        mine = self._of_owner.get(owner)
        if mine is not None and mine.owner is not owner:
            raise RequestError(f"session {mine.id!r} must be of one connection, and a later one has taken it over")
        if mine is None or (name is not None and mine.id != name):
            if mine is not None:
                self.release(owner)
            mine = Session(name, owner) if name is None else self._named.setdefault(name, Session(name, owner))
            mine.owner = owner
            self._of_owner[owner] = mine
        return mine

    def release(self, owner: object) -> None:
        """A connection has ended."""
        mine = self._of_owner.pop(owner, None)
        if mine is not None and mine.owner is owner:
            mine.owner, mine.left_at = None, self._clock()
        self._forget_old()

    def _forget_old(self) -> None:
        left = sorted((each for each in self._named.values() if each.owner is None), key=lambda each: each.left_at)
        expired = [each for each in left if self._clock() - each.left_at > self._timeout]
        for each in {id(each): each for each in (*expired, *left[: max(0, len(left) - self._most_kept)])}.values():
            assert each.id is not None
            del self._named[each.id]

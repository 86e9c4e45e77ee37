"""A robot's process, in whatever Python runs this file: its world is at the other end of stdin and stdout.

    python robot_process.py loop ADDRESS TASK SEED 0       # kuavo_client's loop, which waits for its answers
    python robot_process.py openpi ADDRESS TASK 0 0        # openpi's own client, which knows no seed
    python robot_process.py blend ADDRESS TASK SEED 2      # each answer is taken up two ticks after its look

Both ends write a length in four bytes and a message as kuavo_client packs it. The robot says "observe", and is answered
what it sees; or "act", and is answered whether the episode has ended.
"""

import functools
import struct
import sys


def read(stream):
    """The next message; raises EOFError where there will be none."""
    length = stream.read(4)
    if len(length) < 4:
        raise EOFError("the other end has gone")
    return stream.read(struct.unpack("!I", length)[0])


def write(stream, message):
    stream.write(struct.pack("!I", len(message)) + message)
    stream.flush()


class World:
    """At the other end."""

    def __init__(self, pack, unpack):
        self._pack, self._unpack = pack, unpack
        self.ended = False

    def observe(self):
        return self._ask({"observe": True})

    def act(self, action):
        self.ended = self._ask({"act": action})["ended"]

    def _ask(self, message):
        write(sys.stdout.buffer, self._pack(message))
        return self._unpack(read(sys.stdin.buffer))


def loop(address, task, seed, _delay):
    from kuavo_client import RobotLoop, pack, unpack

    world = World(pack, unpack)
    settings = {"rate": None, "handover": "wait", "limits": None, "seed": seed}  # as `evaluate` does
    RobotLoop(world.observe, world.act, address, task, **settings).run(done=lambda: world.ended)


def openpi(address, task, _seed, _delay):
    from openpi_client.msgpack_numpy import packb, unpackb
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    world, policy = World(packb, unpackb), WebsocketClientPolicy(address)
    steps, tick = policy.get_server_metadata()["n_action_steps"], 0
    while not world.ended:
        if tick % steps == 0:
            chunk = policy.infer(dict(world.observe(), prompt=task))["actions"]
        world.act(chunk[tick % steps])
        tick += 1


def delayed(kind, address, task, seed, delay):
    """The client's hand-over by a clock that counts ticks, so that an episode does not depend on the machine."""
    import numpy as np

    from kuavo_client import Handover, Server, pack, unpack

    world, server = World(pack, unpack), Server(address)
    handover, frames = Handover(kind, server.metadata["n_action_steps"]), server.metadata["frames"]
    begins, answer, history = {"reset": True, "seed": seed}, {}, []  # type: ignore[var-annotated]
    command, due_at, tick = None, 0, 0

    def take_up():
        if handover.waiting and tick >= due_at:
            handover.arrived(answer["actions"])

    while not world.ended:
        seen = world.observe()
        history = ((history or [seen] * frames) + [seen])[-frames:]
        take_up()
        if handover.due:
            shown = {key: np.stack([each[key] for each in history]) if frames > 1 else seen[key] for key in seen}
            answer = server.ask(dict(shown, task=task, **dict(handover.look(delay), **begins)))
            due_at, begins = tick + delay, {"chunk": answer["chunk"]}
            take_up()
        action = handover.action()
        if action is not None:
            command = action
        elif command is None:  # before the first answer the joints are told to be where they are
            names = list(server.metadata["tasks"][answer["task"]]["state_names"])
            pose = {name: seen["observation.state"][place] for place, name in enumerate(names)}
            command = np.array([pose.get(name, 0.0) for name in answer["names"]], np.float32)
        world.act(command)
        tick += 1
    server.close()


def main(how, address, task, seed, delay):
    own = {"loop": loop, "openpi": openpi}
    drive = own[how] if how in own else functools.partial(delayed, how)
    drive(address, task, int(seed), int(delay))


if __name__ == "__main__":
    main(*sys.argv[1:])

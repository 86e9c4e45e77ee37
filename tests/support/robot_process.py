"""A robot's process, in whatever Python runs this file: its world is at the other end of stdin and stdout.

    python robot_process.py kuavo_client|openpi_client ADDRESS TASK TICKS SEED

Both ends write a length in four bytes and a message as kuavo_client packs it. The robot asks "observe" or "act".
"""

import struct
import sys


def read(stream):
    (length,) = struct.unpack("!I", stream.read(4))
    return stream.read(length)


def write(stream, message):
    stream.write(struct.pack("!I", len(message)) + message)
    stream.flush()


def main(client, address, task, ticks, seed):
    world_in, world_out = sys.stdin.buffer, sys.stdout.buffer
    if client == "kuavo_client":
        from kuavo_client import RobotLoop, pack, unpack
    else:
        from openpi_client.msgpack_numpy import packb as pack
        from openpi_client.msgpack_numpy import unpackb as unpack
        from openpi_client.websocket_client_policy import WebsocketClientPolicy

    def observe():
        write(world_out, pack({"observe": True}))
        return unpack(read(world_in))

    def act(action):
        write(world_out, pack({"act": action}))
        return read(world_in)

    if client == "kuavo_client":
        RobotLoop(observe, act, address, task, rate=None, limits=None, seed=seed).run(ticks)
        return
    policy = WebsocketClientPolicy(address)
    steps = policy.get_server_metadata()["n_action_steps"]
    for tick in range(ticks):
        if tick % steps == 0:
            chunk = policy.infer(dict(observe(), prompt=task))["actions"]
        act(chunk[tick % steps])


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))

"""Writes the small trace for `kvortex bench replay`: conversations that go on and off, some with a shared beginning.

Usage: make_trace.py > trace.jsonl      the same bytes every time

The format is the Mooncake project's; the numbers are drawn here and stand for no real users.
"""

import itertools
import json
import random

REQUESTS = 800
TOKENS = 512


def conversations(draw, fresh):
    """Endless: the blocks of a prompt, and what the next turn of its conversation adds."""
    shared = [[next(fresh) for _ in range(draw.randrange(2, 9))] for _ in range(4)]
    going = []
    while True:
        # A new one now and then; else one that has gone on lately, more often than an old one.
        if not going or draw.random() < 0.3:
            going.append(list(draw.choice(shared)) if draw.random() < 0.6 else [])
            blocks = going[-1]
        else:
            blocks = going[-min(len(going), 1 + int(draw.expovariate(0.03)))]
        blocks += [next(fresh) for _ in range(1 + int(draw.expovariate(0.35)))]
        yield list(blocks)
        going = [one for one in going if len(one) < 60]


def requests():
    """The lines of the trace."""
    draw, clock = random.Random(6), 0.0
    for blocks in itertools.islice(conversations(draw, itertools.count()), REQUESTS):
        clock += draw.expovariate(1 / 900)
        rest = draw.randrange(1, TOKENS + 1)
        yield {
            "timestamp": int(clock),
            "input_length": (len(blocks) - 1) * TOKENS + rest,
            "output_length": 1 + int(draw.expovariate(1 / 200)),
            "hash_ids": blocks,
        }


if __name__ == "__main__":
    for request in requests():
        print(json.dumps(request, separators=(",", ":")))

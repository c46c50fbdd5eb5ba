"""What is compared with what, and the targets."""

from dataclasses import dataclass, replace

from bench.servers import (
    ALONE,
    CEILING,
    EXPRESS,
    FASTAPI,
    FLASK,
    JSON_SERVER,
    MATCHING,
    NORMAL,
    PEERS,
    SERVICE,
)

CONNECTIONS = (1, 8, 32, 128)


@dataclass(frozen=True)
class Run:
    """One measurement: what is loaded, with what, and how."""

    server: str
    connections: int = 0
    load: str = "new"  # or "mix", or "random", as load.lua has them
    delay: int = 0  # milliseconds by which each sync of the disk takes longer
    filled: bool = False  # whether there are very many visitors, with tokens like the load's

    def special(self):
        """Return how the run differs from new tokens on an empty table and the disk as it is."""
        load = {"mix": ["half known tokens"], "random": ["random tokens"]}.get(self.load, [])
        filled = ["many visitors"] if self.filled else []
        delay = [f"syncs {self.delay} ms slower"] if self.delay else []
        return ", ".join(load + filled + delay)


@dataclass(frozen=True)
class Ratio:
    """A number of our run divided by the same number of theirs, and what it should be."""

    name: str
    ours: Run
    theirs: Run
    key: str = "rate"  # of which more is better; or "cpu" or "p99", of which less is
    counts: tuple[int, ...] = CONNECTIONS
    must: tuple[float, ...] = ()  # at each of `counts`, or nothing
    goal: tuple[float, ...] = ()

    def pairs(self):
        """Return a number of connections, our run and theirs, for each of `counts`."""
        return [
            (count, replace(self.ours, connections=count), replace(self.theirs, connections=count))
            for count in self.counts
        ]

    def target(self, values):
        """Return `must` or `goal` as the table shows it."""
        sign = "≥" if self.key == "rate" else "≤"
        return f"{sign} {' / '.join(f'{value:g}' for value in values)}" if values else ""

    def misses(self, value, count):
        """Return whether the ratio, at so many connections, is not what it must be."""
        must = dict(zip(self.counts, self.must, strict=False)).get(count, value)
        return value < must if self.key == "rate" else value > must


US, MATCH, BARE, FULL = Run(SERVICE), Run(MATCHING), Run(CEILING), Run(EXPRESS)
TARGETS = (
    Ratio(
        "CPU per registration, against bare Falcon",
        US,
        BARE,
        "cpu",
        must=(2.3, 1.25, 1.0, 1.0),
        goal=(1.8, 0.95, 0.75, 0.75),
    ),
    Ratio(
        "throughput, against bare Falcon",
        US,
        BARE,
        must=(0.36, 0.52, 0.65, 0.68),
        goal=(0.45, 0.65, 0.85, 0.90),
    ),
    Ratio(
        "throughput, against Express, FULL",
        US,
        FULL,
        must=(0.9, 1.7, 2.2, 2.2),
        goal=(1.1, 2.1, 2.8, 2.8),
    ),
    Ratio(
        "throughput, against Express, NORMAL",
        US,
        Run(NORMAL),
        must=(0.5, 0.9, 1.1, 1.1),
        goal=(0.65, 1.1, 1.4, 1.4),
    ),
    Ratio(
        "99 % of the answers within, against bare Falcon",
        US,
        BARE,
        "p99",
        must=(4, 2.5, 2, 2),
        goal=(3, 2, 1.5, 1.5),
    ),
    Ratio(
        "throughput, syncs 5 ms slower, against Express, FULL",
        replace(US, delay=5),
        replace(FULL, delay=5),
        counts=(8, 32, 128),
        must=(6, 14, 21),
        goal=(7, 18, 30),
    ),
)
MEMORY, START = (55, 45), (0.4, 0.25)  # MB and seconds: the must and the goal

# All of them compare throughput. "Matching all" is LIVECHAT_MATCH=token,phone,email, as the peers do.
OTHERS = (
    Ratio("a commit per request", US, Run(ALONE), counts=(1, 32)),
    Ratio(
        "a commit per request; syncs 5 ms slower",
        replace(US, delay=5),
        Run(ALONE, delay=5),
        counts=(32,),
    ),
    *(Ratio(f"{peer}; matching all", MATCH, Run(peer)) for peer in (FLASK, EXPRESS, NORMAL)),
    *(
        Ratio(f"{peer}; matching all", MATCH, Run(peer), counts=(32,))
        for peer in (FASTAPI, JSON_SERVER)
    ),
    *(
        Ratio(
            f"{peer}; matching all, half known tokens",
            replace(MATCH, load="mix"),
            Run(peer, load="mix"),
            counts=(32,),
        )
        for peer in (FLASK, EXPRESS)
    ),
    *(
        Ratio(
            f"itself on an empty table; with many visitors, {name} tokens",
            replace(US, load=load, filled=True),
            replace(US, load=load),
            counts=(32,),
        )
        for load, name in (("new", "sequential"), ("random", "random"))
    ),
)


def possible(peers, slow_disk):
    """Return the lines of both tables that can be measured with what there is."""
    left_out = () if peers else PEERS

    def can_be(ratio):
        return ratio.theirs.server not in left_out and (slow_disk or not ratio.ours.delay)

    return [list(filter(can_be, ratios)) for ratios in (TARGETS, OTHERS)]

"""A clock for tests of time."""


class FakeClock:
    """Stands still, but for `tick` seconds at each reading and `advance`."""

    def __init__(self, tick=0.0):
        self.now = 0.0
        self.tick = tick
        self.readings = 0

    def __call__(self):
        self.readings += 1
        self.now += self.tick
        return self.now

    def advance(self, seconds):
        self.now += seconds

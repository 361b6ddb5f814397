"""What a server counts, as the text that Prometheus reads."""

from __future__ import annotations

from collections import Counter, deque
from threading import Lock

import numpy as np

LATEST = 1000  # requests whose times the quantiles are of
HELP = {
    "wam_connections_total": "Robots that connected.",
    "wam_requests_total": "Requests that were answered with actions.",
    "wam_errors_total": "Requests that were answered with an error, and connections that were refused, by reason.",
    "wam_batches_total": "Predictions, each for all requests that waited for it.",
    "wam_request_seconds": "From a request to its actions, of the latest ones.",
}


class Metrics:
    """Counters and times, from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=LATEST)
        self._sum = 0.0

    def count(self, name: str, reason: str | None = None) -> None:
        """One more of ``name``, a key of ``HELP``."""
        assert name in HELP
        with self._lock:
            self._counts[name if reason is None else f'{name}{{reason="{reason}"}}'] += 1

    def answered(self, seconds: float) -> None:
        """A request got its actions."""
        self.count("wam_requests_total")
        with self._lock:
            self._seconds.append(seconds)
            self._sum += seconds

    def text(self, **gauges: int) -> str:
        """All of it, and ``gauges`` as they are now."""
        with self._lock:
            counts, seconds, total = dict(self._counts), list(self._seconds), self._sum
        lines = []
        for name, line in HELP.items():
            times = name == "wam_request_seconds"
            lines += [f"# HELP {name} {line}", f"# TYPE {name} {'summary' if times else 'counter'}"]
            if not times:
                found = {k: v for k, v in counts.items() if k.partition("{")[0] == name} or {name: 0}
                lines += [f"{key} {value}" for key, value in sorted(found.items())]
                continue
            for q in (0.5, 0.95, 0.99) if seconds else ():
                lines.append(f'{name}{{quantile="{q}"}} {np.quantile(seconds, q):.6f}')
            lines += [f"{name}_sum {total:.6f}", f"{name}_count {counts.get('wam_requests_total', 0)}"]
        for name, value in gauges.items():
            lines += [f"# TYPE wam_{name} gauge", f"wam_{name} {value}"]
        return "\n".join(lines) + "\n"

"""What every test shares: signals as in a terminal, and examples that repeat.

Hypothesis draws the same examples in every run and on every machine;
`pytest --hypothesis-profile=explore` draws new ones, and more of them.
"""

import signal

from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile("repeatable")

# A shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP. Children inherit
# ignored signals, so a server under test would not be interrupted either. Signals with a handler
# are reset in children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

"""What every test shares: Hypothesis draws the same examples in every run and on every machine.

`pytest --hypothesis-profile=explore` draws new ones, and more of them.
"""

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

"""Reads what `top` needs from a Prometheus text exposition, and nothing else of the format."""

import http.client
import math
import re
import ssl
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from typing import TypeAlias
from urllib.parse import SplitResult, urlsplit

from conveyor.os_errors import os_reason
from conveyor_client._errors import TransportError

Labels: TypeAlias = tuple[tuple[str, str], ...]
Samples: TypeAlias = Mapping[str, Mapping[Labels, float]]

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ([-+.\w]+)(?: \d+)?$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_EXPOSITION_BYTES_MAX = 16 * 1024 * 1024


def fetch(url: str, timeout_seconds: float, context: ssl.SSLContext | None = None) -> Samples:
    """Scrapes an endpoint.

    Args:
        url: "http://host:port/metrics"; scheme and path may be left out.
        timeout_seconds: For connecting and for reading.
        context: Whom to trust where the URL says https; None means the system's roots.

    Returns:
        The samples: metric name to labels to value.

    Raises:
        TransportError: It does not answer, or not with metrics.
    """
    parts, connection = _connection(url, timeout_seconds, context)
    try:
        connection.request("GET", parts.path or "/metrics")
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise TransportError(
                f"{url} answered {response.status}; expected 200 and metrics", reason="TRANSPORT"
            )
        return parse(response.read(_EXPOSITION_BYTES_MAX).decode())
    except OSError as error:
        message = f"cannot reach {url}: {os_reason(error)}"
        raise TransportError(message, reason="TRANSPORT") from error
    except (http.client.HTTPException, UnicodeDecodeError) as error:
        message = f"{url}: what answers there does not speak HTTP with metrics"
        raise TransportError(message, reason="TRANSPORT") from error
    finally:
        connection.close()


def _connection(
    url: str, timeout_seconds: float, context: ssl.SSLContext | None
) -> tuple[SplitResult, http.client.HTTPConnection]:
    parts = urlsplit(url if "//" in url else f"http://{url}")
    try:
        host, port = parts.hostname or "", parts.port
        if not host.encode("idna"):
            raise ValueError("no host")
    except ValueError as error:  # a port that is no number or too large, or no name of a host
        message = f"{url} is not an address of metrics; expected http://HOST:PORT"
        raise TransportError(message, reason="TRANSPORT") from error
    if parts.scheme == "https":
        return parts, http.client.HTTPSConnection(
            host, port or http.client.HTTPS_PORT, timeout=timeout_seconds, context=context
        )
    return parts, http.client.HTTPConnection(
        host, port or http.client.HTTP_PORT, timeout=timeout_seconds
    )


def parse(text: str) -> Samples:
    """Parses an exposition.

    Args:
        text: Prometheus text format; comments and what is not a sample are passed over.

    Returns:
        The samples: metric name to labels to value.
    """
    samples: dict[str, dict[Labels, float]] = defaultdict(dict)
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        name, labels, value = match.groups()
        pairs = tuple(sorted(_LABEL.findall(labels or "")))
        with suppress(ValueError):
            samples[name][pairs] = float(value)
    return samples


def total(samples: Samples, name: str, **where: str) -> float:
    """Adds up the samples of a metric that have these labels."""
    return sum(
        value
        for labels, value in samples.get(name, {}).items()
        if all(pair in labels for pair in where.items())
    )


def by_label(samples: Samples, name: str, label: str, **where: str) -> dict[str, float]:
    """Adds up the samples of a metric for each value of one label."""
    sums: dict[str, float] = defaultdict(float)
    for labels, value in samples.get(name, {}).items():
        if all(pair in labels for pair in where.items()):
            sums[dict(labels).get(label, "")] += value
    return dict(sums)


def quantile(before: Samples, after: Samples, name: str, q: float, **where: str) -> float:
    """Estimates a quantile of what a histogram took in between two scrapes.

    Args:
        before: The earlier scrape.
        after: The later one.
        name: The histogram's name, without suffix.
        q: From 0 to 1.
        **where: Only samples with these labels.

    Returns:
        Linear within its bucket, as PromQL does it; NaN if nothing was taken in.
    """
    old = by_label(before, f"{name}_bucket", "le", **where)
    new = by_label(after, f"{name}_bucket", "le", **where)
    buckets = sorted((float(bound), count - old.get(bound, 0.0)) for bound, count in new.items())
    if not buckets or buckets[-1][1] <= 0:
        return math.nan
    rank = q * buckets[-1][1]
    low_bound, low_count = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            if math.isinf(bound):
                return low_bound
            inside = count - low_count
            share = (rank - low_count) / inside if inside else 1.0
            return low_bound + (bound - low_bound) * share
        low_bound, low_count = bound, count
    return low_bound

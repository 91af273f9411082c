"""A stranger's https: address -> the bytes of a picture, from hosts that are allowed by name and from no others.

    host      allowed, exactly or as a domain above it; looked up once; every address of it public
    request   to that very address, under the host's name; no redirect is followed, no proxy asked
    answer    200, within a deadline for all of it, cut off beyond Rules.max_bytes; then checked as any picture

Reasons never repeat the address, nor what was found there.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

import httpx

from rayllava.fetch.images import Rules, check_image

_TUNNELS = tuple(IPv6Network(net) for net in ("2002::/16", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32"))
"""6to4, NAT64 and Teredo: public addresses that lead to any other."""


@dataclass(frozen=True, slots=True)
class Hosts:
    """Where pictures may be fetched from."""

    allowed: tuple[str, ...] = ()
    """Domains; one allows those below it too. None: nothing is fetched."""
    deadline_s: float = 10.0
    """For a whole picture, from the look-up of its host."""


def fetch(
    url: str,
    rules: Rules,
    hosts: Hosts,
    *,
    look_up: Callable[[str], Iterable[str]] | None = None,
    transport: httpx.BaseTransport | None = None,
) -> bytes:
    """Return the picture at an address; ValueError with the reason when it is none that we take.

    `look_up` and `transport` stand in for the name service and the network.
    """
    ends = time.monotonic() + hosts.deadline_s
    host, target = _parsed(url, hosts)
    address = _public(host, (look_up or _look_up)(host))
    literal = f"[{address}]" if ":" in address else address
    request_url = httpx.URL(f"https://{literal}{target}")
    options = {
        "headers": {"Host": host, "Accept": "image/*", "Accept-Encoding": "identity"},
        "extensions": {"sni_hostname": host},
    }
    client = httpx.Client(
        transport=transport, trust_env=False, follow_redirects=False, timeout=httpx.Timeout(hosts.deadline_s)
    )
    try:
        with client, client.stream("GET", request_url, **options) as answer:  # type: ignore[arg-type]
            if answer.status_code != 200:
                raise ValueError(f"the image's host answers {answer.status_code}; redirects are not followed")
            content = _read(answer.iter_raw(), rules, ends)
    except httpx.HTTPError as error:
        raise ValueError(f"the image's host does not answer ({type(error).__name__})") from error
    check_image(content, rules)
    return content


def _read(chunks: Iterable[bytes], rules: Rules, ends: float) -> bytes:
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > rules.max_bytes:
            raise ValueError(f"the image has more than {rules.max_bytes} bytes; send a smaller one")
        if time.monotonic() > ends:
            raise ValueError("the image takes too long to come")
    return bytes(content)


def _parsed(url: str, hosts: Hosts) -> tuple[str, str]:
    """Return (host in lower case, path and query) of an address that may be asked."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode().lower().rstrip("."), parts.port
    except (ValueError, UnicodeError) as error:
        raise ValueError("the image's address is none") from error
    if parts.scheme.lower() != "https" or parts.username is not None or port not in (None, 443):
        raise ValueError("remote images are read from https: addresses without user or port; or send a data: URL")
    if not any(host == name or host.endswith(f".{name}") for name in map(str.lower, hosts.allowed)):
        raise ValueError("remote images from this host are off; send a data: URL")
    return host, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _public(host: str, addresses: Iterable[str]) -> str:
    """Return the first address of a host, all of which must be public."""
    found = [ip_address(text) for text in addresses]
    for address in found:
        tunnel = isinstance(address, IPv6Address) and (
            address.ipv4_mapped is not None or any(address in net for net in _TUNNELS)
        )
        if not address.is_global or address.is_multicast or tunnel:
            raise ValueError("the image's host is none of the public internet")
    if not found:
        raise ValueError("the image's host is not known")
    return str(found[0])


def _look_up(host: str) -> list[str]:
    try:
        return [str(info[4][0]) for info in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise ValueError("the image's host is not known") from error

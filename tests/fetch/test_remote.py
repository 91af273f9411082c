"""Pictures come from hosts that are allowed, over the public internet, and within bounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from rayllava.fetch.images import Rules
from rayllava.fetch.remote import Hosts, fetch

PICTURE = (Path(__file__).parents[1] / "assets" / "gguf_llava" / "image_square.png").read_bytes()
HOSTS = Hosts(allowed=("example.org", "Pictures.example.com"))


def asked(
    url: str,
    *,
    addresses: tuple[str, ...] = ("93.184.216.34",),
    answer: Callable[[httpx.Request], httpx.Response] = lambda _: httpx.Response(200, content=iter([PICTURE])),
    hosts: Hosts = HOSTS,
    rules: Rules = Rules(),  # noqa: B008
) -> tuple[bytes, list[httpx.Request]]:
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return answer(request)

    transport = httpx.MockTransport(handle)
    return fetch(url, rules, hosts, look_up=lambda _: addresses, transport=transport), seen


@pytest.mark.parametrize("host", ["example.org", "EXAMPLE.org", "a.b.example.org", "pictures.example.com"])
def test_an_allowed_host_is_asked_at_the_address_that_was_looked_at(host: str) -> None:
    content, [request] = asked(f"https://{host}/a/cat.png?size=1#top")
    assert content == PICTURE
    assert str(request.url) == "https://93.184.216.34/a/cat.png?size=1"
    assert request.headers["host"] == host.lower() and request.extensions["sni_hostname"] == host.lower()


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.org/cat.png",
        "https://notexample.org/cat.png",
        "https://example.org.evil.org/cat.png",
        "https://example.com/cat.png",
        "https://93.184.216.34/cat.png",
        "https://127.0.0.1/cat.png",
        "https://[::1]/cat.png",
        "https:///cat.png",
    ],
)
def test_other_hosts_are_not_asked(url: str) -> None:
    with pytest.raises(ValueError, match=r"remote images from this host are off|address is none"):
        asked(url, answer=lambda _: pytest.fail("asked"))


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/cat.png",
        "https://user@example.org/cat.png",
        "https://example.org:8443/cat.png",
        "file:///etc/passwd",
        "ftp://example.org/cat.png",
        "gopher://example.org/_x",
    ],
)
def test_other_schemes_users_and_ports_are_not_asked(url: str) -> None:
    with pytest.raises(ValueError, match="read from https: addresses without user or port"):
        asked(url, answer=lambda _: pytest.fail("asked"))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.7",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1",
        "fd00::1",
        "::ffff:169.254.169.254",
        "::ffff:93.184.216.34",
        "2002:a9fe:a9fe::1",
        "64:ff9b::a9fe:a9fe",
        "2001:0:53aa:64c::1",
    ],
)
def test_a_host_inside_is_not_asked_even_beside_a_public_address(address: str) -> None:
    with pytest.raises(ValueError, match="none of the public internet") as caught:
        asked(
            "https://example.org/cat.png", addresses=("93.184.216.34", address), answer=lambda _: pytest.fail("asked")
        )
    assert address not in str(caught.value)


def test_a_redirect_is_not_followed() -> None:
    inside = {"Location": "http://169.254.169.254/latest/meta-data"}
    with pytest.raises(ValueError, match="answers 302; redirects are not followed"):
        asked("https://example.org/cat.png", answer=lambda _: httpx.Response(302, headers=inside))


def test_more_bytes_than_allowed_are_not_read() -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield b"\x89PNG" * 250

    with pytest.raises(ValueError, match="more than 10000 bytes"):
        asked(
            "https://example.org/cat.png",
            answer=lambda _: httpx.Response(200, content=endless(), headers={"Content-Length": "12"}),
            rules=Rules(max_bytes=10_000),
        )
    assert sent <= 12_000


def test_a_slow_host_is_given_up() -> None:
    def drip() -> Iterator[bytes]:
        while True:
            time.sleep(0.05)
            yield b"x"

    began = time.monotonic()
    with pytest.raises(ValueError, match="takes too long"):
        asked(
            "https://example.org/cat.png",
            answer=lambda _: httpx.Response(200, content=drip()),
            hosts=Hosts(allowed=("example.org",), deadline_s=0.3),
        )
    assert time.monotonic() - began < 2


def test_what_is_no_picture_is_refused_without_saying_what_it_is() -> None:
    with pytest.raises(ValueError, match="none of JPEG") as caught:
        asked(
            "https://example.org/cat.png",
            answer=lambda _: httpx.Response(200, content=iter([b"secret of the house"])),
        )
    assert "secret" not in str(caught.value)


def test_a_host_that_fails_is_told_by_kind_alone() -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("to 93.184.216.34 refused")

    with pytest.raises(ValueError, match=r"does not answer \(ConnectError\)") as caught:
        asked("https://example.org/cat.png", answer=fail)
    assert "93.184" not in str(caught.value)

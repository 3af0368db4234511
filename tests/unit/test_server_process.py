"""Announcements of server processes."""

from __future__ import annotations

import pytest

from trilith.errors import UnavailableError
from trilith_services.server_process import Announcement


class Listing:
    """A directory's list of processes that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.away = False

    def announce(self, replica: int | None, address: str, *, available: bool) -> int:
        self.told.append(("announce", replica, address, available))
        return 7 if replica is None else replica

    def withdraw(self, replica: int, address: str) -> None:
        self.told.append(("withdraw", replica, address))
        if self.away:
            raise UnavailableError("nobody answers")

    def close(self) -> None:
        self.told.append(("close",))


@pytest.fixture
def listing() -> Listing:
    return Listing()


def announcement(listing: Listing, number: int | None) -> Announcement:
    return Announcement(listing, number, where=lambda: "10.0.0.1:7100")  # type: ignore[arg-type]


@pytest.mark.parametrize(("given", "number"), [(None, 7), (3, 3)])
def test_a_process_keeps_the_number_it_was_first_announced_under(listing, given, number):
    said = announcement(listing, given)
    said.say(available=False)
    said.say(available=True)
    said.withdraw()
    said.close()
    assert listing.told == [
        ("announce", given, "10.0.0.1:7100", False),
        ("announce", number, "10.0.0.1:7100", True),
        ("withdraw", number, "10.0.0.1:7100"),
        ("close",),
    ]


def test_what_was_withdrawn_is_not_announced_again(listing):
    said = announcement(listing, 0)
    said.withdraw()
    said.say(available=True)
    assert not listing.told


def test_a_directory_that_is_away_does_not_hinder_the_end(listing, caplog):
    said = announcement(listing, 0)
    said.say(available=True)
    listing.away = True
    said.withdraw()
    assert "could not deregister: nobody answers" in caplog.text


def test_without_a_directory_nobody_asks_for_the_address():
    said = Announcement(None, 0, where=lambda: pytest.fail("asked"))
    said.say(available=True)
    said.withdraw()
    said.close()

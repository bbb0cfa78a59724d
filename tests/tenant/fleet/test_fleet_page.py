"""The fleet's page in a real Chromium, on a real PostgreSQL with 100,000 hosts in its table."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import psycopg
import pytest
import trio
from browser import FOREIGN, BrowserPage, chromium, needs_chromium
from helpers import LIMIT_S, wait_until
from needs_postgres import needs_postgres
from selenium import webdriver

from provider_proxy.tenant.fleet import overview, schema, views
from provider_proxy.tenant.fleet.admin import FleetAdmin, Standing
from provider_proxy.tenant.fleet.database import Database, read_address
from provider_proxy.tenant.watch.http_server import TenantHttpServer, listen
from provider_proxy.testing.postgres import Postgres, postgres

pytestmark = [needs_postgres, needs_chromium, pytest.mark.real]

HOSTS = 100_000
REFUSED, FAILED, OLD, NEVER, LISTED = 137, 240, 95, 11, 30
HOSTILE = "<img src=x onerror=alert(1)>"
FILL = f"""
insert into host (name, shard, rules, files)
select 'rack' || lpad((n / 40)::text, 4, '0') || '-node' || lpad((n %% 40)::text, 2, '0'), n %% 64,
    case when n < {LISTED} then '{{"need_provider_quote": false}}' else '{{}}' end::jsonb, '{{}}'
from generate_series(0, {HOSTS - 1}) as n;
insert into host_state (name, shard, verdict, verdict_at, fresh_until, error, reason)
select name, shard,
    case when n < %(refused)s then 'INVALID_QUOTE' when n < %(failed)s then 'FAILED' else 'TRUSTED' end,
    now() - interval '3 s',
    now() + case when n < %(old)s and n >= %(failed)s then - interval '1 s' else interval '1 day' end,
    case when n < %(refused)s then 'PolicyError' when n < %(failed)s then 'ReplyError' end,
    case when n < %(refused)s then 'PCR 0 is %(hostile)s' when n < %(failed)s then 'no answer' end
from (select name, shard, row_number() over (order by name desc) - 1 as n from host) h
where n < {HOSTS} - %(never)s - {LISTED};
insert into history (at, state, hosts)
select at, state, case state when 'TRUSTED' then 99500 else (random() * 200)::integer end
from generate_series(now() - interval '25 hours', now(), interval '1 minute') as at,
    unnest(array['TRUSTED', 'INVALID_QUOTE', 'FAILED']) as state;
insert into member (id, name, version, started, until)
select gen_random_uuid(), name, '1.2.3', now(), now() + interval '1 day'
from unnest(array['watch-a', 'watch-b', 'twin', 'twin']) as name;
update lease set owner = (select id from member where name = 'watch-a'), epoch = 1,
    until = now() + interval '1 day';
insert into silence
values (gen_random_uuid(), 'rack0007-%%', '%(hostile)s', now(), now() + interval '2 hours');
analyze;
"""


def fill(connection: psycopg.Connection[Any]) -> None:
    values = {
        "refused": REFUSED,
        "failed": REFUSED + FAILED,
        "old": REFUSED + FAILED + OLD,
        "never": NEVER,
        "hostile": HOSTILE,
    }
    connection.execute((FILL % values).encode())


class Site:
    """A member's admin listener in a thread of its own."""

    def __init__(self, server: Postgres) -> None:
        self.url = ""
        self.trouble: str | None = None
        self._server = server
        self._started = threading.Event()
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread = threading.Thread(target=trio.run, args=(self._serve,))
        self._thread.start()
        assert self._started.wait(LIMIT_S)

    async def _serve(self) -> None:
        database = Database(
            read_address(f"postgresql:///postgres?host={self._server.folder}&user=postgres")
        )
        admin = FleetAdmin(
            database, lambda: Standing("watch-a", "1.2.3", self.trouble), lambda: b"metrics 1\n"
        )
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        self._token = trio.lowlevel.current_trio_token()
        self._started.set()
        with self._scope:
            await TenantHttpServer(admin.answer, None).serve(listener)
        database.close()

    def close(self) -> None:
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(LIMIT_S)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        with psycopg.connect(running.dsn, autocommit=True) as connection:
            schema.migrate(connection)
            fill(connection)
        yield running


@pytest.fixture(scope="module")
def site(server: Postgres) -> Iterator[Site]:
    made = Site(server)
    yield made
    made.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("chromium")) as made:
        yield made


class Page(BrowserPage):
    """The page, opened."""

    def __init__(self, driver: webdriver.Chrome, site: Site) -> None:
        super().__init__(driver)
        self.site = site
        self.errors()  # forget another test's

    def open(self, fragment: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get(self.site.url + fragment)
        wait_until(lambda: self.text("state") != "asking", "the first answer")
        wait_until(lambda: self.text("count") != "", "the first search")

    def says(self, name: str, text: str) -> bool:
        return self.text(name) == text


@pytest.fixture
def page(driver: webdriver.Chrome, site: Site) -> Iterator[Page]:
    made = Page(driver, site)
    yield made
    assert made.errors() == []


TROUBLED = REFUSED + FAILED + OLD + NEVER


def test_it_says_how_the_fleet_stands(page: Page) -> None:
    page.open()
    assert page.text("state") == "Needs a person"
    assert page.text("why") == f"{TROUBLED} hosts of {HOSTS - LISTED:,} need a person."
    assert page.text("advice") == (
        f"{REFUSED} refused, {FAILED} no evidence, {OLD} verdict too old, {NEVER} never verified."
    )
    assert page.text("trusted") == f"{HOSTS - LISTED - TROUBLED:,}"
    assert page.text("shards") == "64 / 64"
    names = [row[0] for row in page.rows("members")]
    assert {"watch-a", "watch-b"} < set(names)
    assert sum(name.startswith("twin (") for name in names) == 2  # told apart by their ids
    assert page.rows("silences")[0][0] == "rack0007-%"
    assert page.rows("silences")[0][2] == HOSTILE  # as text
    assert page.run("return document.querySelector('main img')") is None


def test_hosts_that_need_a_person_come_first_and_a_page_at_a_time(page: Page) -> None:
    page.open()
    seen = [row[0] for row in page.rows("rows")]
    assert len(seen) == overview.MAX_PAGE
    assert {row[1] for row in page.rows("rows")} == {"refused"}
    assert page.text("count") == f"{TROUBLED} hosts"
    for number in range(2, 6):
        page.run("document.getElementById('next').click()")
        wait_until(partial(page.says, "page-number", f"page {number}"), "the next page")
        seen += [row[0] for row in page.rows("rows")]
    assert len(seen) == len(set(seen)) == TROUBLED
    assert page.run("return document.getElementById('next').disabled")
    page.run("document.getElementById('previous').click()")
    wait_until(lambda: page.text("page-number") == "page 4", "the page before")


def test_a_search_is_the_server_s(page: Page) -> None:
    page.open("#q=node07&state=")
    assert page.text("count") == f"{HOSTS // 40:,} hosts"
    page.open("#q=RACK0042-node1&state=")
    assert len(page.rows("rows")) == 10  # whatever the case
    page.open("#q=" + "%25" + "&state=")  # a sign, not a pattern
    assert page.rows("rows") == [["No host matches."]]
    page.open("#state=")
    assert page.text("count") == f"more than {overview.MAX_COUNTED:,} hosts"


def test_one_types_and_hosts_are_there(page: Page) -> None:
    page.open("#state=")
    page.run("document.getElementById('q').focus()")
    page.press(*"rack0100-node33")
    wait_until(lambda: page.text("count") == "1 host", "the search")
    assert page.rows("rows")[0][:2] == ["rack0100-node33", "trusted"]
    assert "q=rack0100-node33" in page.driver.current_url


def test_the_past_is_drawn(page: Page) -> None:
    page.open()
    bars = "return document.querySelectorAll('#chart g.bar').length"
    assert 100 < page.run(bars) <= overview.BARS + 1
    page.run("document.querySelector('[data-hours=\"1\"]').click()")
    wait_until(lambda: page.run(bars) < 70, "the last hour")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page: Page, scheme: str) -> None:
    page.media(scheme)
    page.open()
    ratios = page.contrasts()
    assert len(ratios) > 100
    assert [found for found in ratios if found[0] < 4.5] == []  # WCAG 2.2, 1.4.3


@pytest.mark.parametrize("width", [320, 700, 1180])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.size(width)
    page.open()
    scroll, window = page.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert window == width
    assert scroll <= width


def test_a_member_in_trouble_says_so(page: Page) -> None:
    page.site.trouble = "the database is not reachable; hosts are watched from memory"
    try:
        page.open()
        said = f"This member: {page.site.trouble}."
        # What was answered just before is remembered for a moment.
        wait_until(partial(page.says, "trouble", said), "the notice")
    finally:
        page.site.trouble = None


def test_the_policy_stops_what_is_not_the_page_s(driver: webdriver.Chrome, site: Site) -> None:
    page = Page(driver, site)
    page.open()
    page.run(
        "const s = document.createElement('script'); s.append('window.gotIn = 1');"
        "document.body.append(s)"
    )
    assert page.run("return window.gotIn === undefined")
    assert "TrustedScript" in json.dumps(page.errors())
    page.run("window.seen = 0; fetch('http://127.0.0.1:9/').catch(() => { window.seen = 1 })")
    wait_until(lambda: page.run("return window.seen") == 1, "the refusal")
    assert "connect-src" in json.dumps(page.errors())


def test_a_name_that_was_pointed_at_us_reads_nothing(driver: webdriver.Chrome, site: Site) -> None:
    page = Page(driver, site)
    for path in ("", "fleet", "hosts"):
        driver.get(site.url.replace("127.0.0.1", FOREIGN) + path)
        assert "rack" not in driver.page_source
        assert '"code":421' in driver.page_source
    page.errors()


def test_questions_to_the_database_are_bounded(server: Postgres) -> None:
    """Whatever is searched for, an answer has a page at most, and the server ends what takes long."""
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        found = overview.search(connection, overview.Search())
        assert (len(found.hosts), found.count) == (overview.MAX_PAGE, overview.MAX_COUNTED + 1)
        with connection.transaction():
            connection.execute("set local statement_timeout = '1ms'")
            begin = time.monotonic()
            overview.search(connection, overview.Search(text="node"))  # sets a limit of its own
            assert time.monotonic() - begin < LIMIT_S
        assert views.fleet_view(connection).by_state["NOT_ASKED"] == LISTED

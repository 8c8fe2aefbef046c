"""Who is let in, what a session is, and how it is resumed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from domi_fast import AuthError, DomiError, Node
from domi_fast.gateway import CloseCode, Gateway, Login
from domi_fast.gateway.ids import Ids, machine_of
from tests.gateway.clients import EXPIRED, HEARTBEAT, RESUME, Told, connected
from tests.gateway.nodes import gateway, gateway_of
from tests.gateway.zones import zone
from tests.support import until

CARRIERS = ["tcp", "websocket"]


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_hello_is_answered_with_a_session(carrier: str) -> None:
    async with gateway(grace=12.5) as gate, connected(gate, carrier) as client:
        await client.hello(b"whatever")
        assert client.grace == 12_500
        assert gate.users == {client.user}
        assert machine_of(client.user) == gate.node.id


async def test_without_authenticate_any_frame_is_a_hello() -> None:
    async with gateway() as gate, connected(gate) as client:
        gate.handle(60, lambda message: message.reply(61, message.data.upper()))
        await client.send(60, b"hi")
        await client.welcomed()
        assert await client.take() == Told(61, b"HI")


async def test_users_have_ids_that_no_other_has() -> None:
    async with gateway() as gate:
        users = set()
        for _ in range(20):
            async with connected(gate, "tcp") as client:
                await client.hello()
                users.add(client.user)
        assert len(users) == 20
        assert all(1023 < user < 1 << 63 for user in users)


def test_ids_are_unique_and_grow_however_fast_they_are_made() -> None:
    ids = Ids(1023)
    made = [ids.next() for _ in range(20_000)]
    assert made == sorted(set(made))
    assert {machine_of(id) for id in made} == {1023}
    other = Ids(7)
    assert not {other.next() for _ in range(20_000)} & set(made)
    assert made[0] > 1023
    with pytest.raises(ValueError, match="machine id 1024: 0 to 1023 are allowed"):
        Ids(1024)


# ------------------------------------------------------------------------------------- authenticate


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("is_async", [False, True])
async def test_authenticate_says_who_it_is(carrier: str, is_async: bool) -> None:
    logins: list[Login] = []

    def judge(login: Login) -> str | None:
        logins.append(login)
        return "alice" if login.data == b"secret" else None

    async def judge_later(login: Login) -> str | None:
        await asyncio.sleep(0)
        return judge(login)

    async with gateway(authenticate=judge_later if is_async else judge) as gate:
        heard: list[Any] = []
        gate.handle(60, heard.append)
        async with connected(gate, carrier) as client:
            await client.hello(b"secret")
            await client.send(60, b"x")
            await client.send(7, b"ping")
            assert await client.take() == Told(HEARTBEAT, b"pong")
        assert heard[0].identity == b"alice"
        assert heard[0].user == client.user
        assert logins[0].address.startswith("127.0.0.1:")
        assert logins[0].path == ("/" if carrier == "websocket" else "")
        assert ("user-agent" in logins[0].headers) == (carrier == "websocket")
        async with connected(gate, carrier) as stranger:
            await stranger.send(1, b"guess")
            closed = await stranger.closed()
            assert (closed.code, closed.reason) == (4001, "authenticate refused")
        assert gate.node.counters()["clients_refused"] == 1


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_nothing_is_routed_before_the_answer(carrier: str) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def judge(login: Login) -> bool:
        asked.set()
        await answer.wait()
        return True

    async with gateway(authenticate=judge) as gate, connected(gate, carrier) as client:
        heard: list[bytes] = []
        gate.handle(60, lambda message: heard.append(message.data))
        await client.send(1)
        for number in range(5):
            await client.send(60, bytes([number]))
        await asked.wait()
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert heard == []
        assert gate.users == frozenset()
        answer.set()
        await client.welcomed()
        await client.send(7, b"ping")
        assert await client.take() == Told(HEARTBEAT, b"pong")
        assert heard == [bytes([number]) for number in range(5)]


@pytest.mark.parametrize("event", [60, 8, 10, 65535])
async def test_what_comes_before_hello_is_refused_where_there_is_authenticate(event: int) -> None:
    async with gateway(authenticate=lambda login: True) as gate, connected(gate) as client:
        await client.send(event, b"x")
        closed = await client.closed()
        assert (closed.code, closed.reason) == (4001, f"event {event} before HELLO")


async def test_who_does_not_say_hello_in_time_is_cut() -> None:
    settings: dict[str, Any] = {"authenticate": lambda login: True, "authenticate_timeout": 0.1}
    async with gateway(**settings) as gate:
        for carrier in CARRIERS:
            async with connected(gate, carrier) as client:
                closed = await client.closed()
                assert (closed.code, closed.reason) == (4001, "not let in within 0.1 s")


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_who_is_let_in_anyway_may_be_silent(carrier: str) -> None:
    settings = {"authenticate_timeout": 0.1, "ping_interval": 0.05, "ping_timeout": 5.0}
    async with gateway(**settings) as gate, connected(gate, carrier) as client:
        await until(lambda: gate.clients == 1)
        await asyncio.sleep(0.5)  # there is nothing to be awaited
        await client.hello_after_pings()
        assert gate.users == {client.user}


async def test_there_are_so_many_that_are_away() -> None:
    async with gateway(client_limit=2) as gate:
        users = []
        for _ in range(3):
            async with connected(gate) as client:
                await client.hello()
                users.append(client.user)
                client.cut()
            await until(lambda: gate.clients == 0)
        assert gate.users == set(users[1:])


async def test_who_is_judged_for_too_long_is_cut() -> None:
    begun: list[bytes] = []
    ended: list[bytes] = []

    async def judge(login: Login) -> bool:
        begun.append(login.data)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(login.data)
        return True

    settings: dict[str, Any] = {"authenticate": judge, "authenticate_timeout": 0.1}
    async with gateway(**settings) as gate, connected(gate) as client:
        await client.send(1, b"one")
        assert (await client.closed()).code == CloseCode.UNAUTHENTICATED
        await until(lambda: ended == [b"one"])
        async with connected(gate, "tcp") as other:
            await other.send(1, b"two")
            await until(lambda: begun == [b"one", b"two"])
            other.cut()
        await until(lambda: ended == [b"one", b"two"])


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (AuthError("the token has expired"), "the token has expired"),
        (AuthError("bad \udc80"), "bad ?"),
        (RuntimeError("database down, password is hunter2"), "it could not be judged"),
        (12, "it could not be judged"),
        (b"x" * 256, "it could not be judged"),
        (False, "authenticate refused"),
        (None, "authenticate refused"),
    ],
)
async def test_how_authenticate_refuses(answer: object, why: str) -> None:
    def judge(login: Login) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with gateway(authenticate=judge) as gate, connected(gate) as client:
        await client.send(1)
        closed = await client.closed()
        assert (closed.code, closed.reason) == (4001, why)
        assert gate.clients == 0 or gate.users == frozenset()


# ------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_who_comes_back_gets_what_it_has_missed(carrier: str) -> None:
    async with gateway() as gate:
        gate.handle(60, lambda message: None)
        async with connected(gate, carrier) as client:
            await client.hello()
            await client.send(60)
            gate.send(client.user, 61, b"first")
            assert await client.take() == Told(61, b"first")
            client.cut()
        await until_away(gate, client.user)
        for number in range(3):
            assert gate.send(client.user, 61, b"missed %d" % number)
        async with connected(gate, carrier) as again:
            assert await again.resume(client.session, client.received) == client.sent == 1
            for number in range(3):
                assert await again.take() == Told(61, b"missed %d" % number)
            gate.send(client.user, 61, b"after")
            assert await again.take() == Told(61, b"after")
        assert gate.node.counters()["sessions_resumed"] == 1


async def test_what_was_written_and_never_came_is_sent_again() -> None:
    async with gateway() as gate:
        async with connected(gate) as client:
            await client.hello()
            for number in range(5):
                gate.send(client.user, 61, bytes([number]))
            assert [(await client.take()).data for _ in range(2)] == [b"\0", b"\1"]
            client.cut()
        async with connected(gate) as again:
            await again.resume(client.session, client.received)
            assert [(await again.take()).data for _ in range(3)] == [b"\2", b"\3", b"\4"]


async def test_a_session_that_is_resumed_leaves_its_old_connection() -> None:
    async with gateway() as gate, connected(gate) as first, connected(gate, "tcp") as second:
        await first.hello()
        await second.resume(first.session, 0)
        closed = await first.closed()
        assert closed.code == CloseCode.REPLACED
        gate.send(first.user, 61, b"x")
        assert await second.take() == Told(61, b"x")
        assert gate.users == {first.user}


@pytest.mark.parametrize("settings", [{"history": 2}, {"history_bytes": 20}])
async def test_who_has_missed_more_than_is_kept_is_told_so(settings: dict[str, int]) -> None:
    async with gateway(**settings) as gate:
        async with connected(gate) as client:
            await client.hello()
            client.cut()
        await until_away(gate, client.user)
        for _ in range(3):
            gate.send(client.user, 61, b"x")
        async with connected(gate) as again:
            await again.send(RESUME, client.session + bytes(8))
            assert await again.expect(EXPIRED) == b"3 frames were missed, and 2 are kept"
            await again.hello()
            assert again.user != client.user


async def test_a_session_ends_with_its_time_of_grace() -> None:
    async with gateway(grace=0.1) as gate:
        async with connected(gate) as client:
            await client.hello()
            client.cut()
        await until(lambda: not gate.users)
        async with connected(gate) as again:
            await again.send(RESUME, client.session + bytes(8))
            assert b"no such session" in await again.expect(EXPIRED)
        assert not gate.send(client.user, 61, b"x")


async def test_without_grace_a_session_ends_with_its_connection() -> None:
    async with gateway(grace=0) as gate:
        async with connected(gate) as client:
            await client.hello()
            assert client.grace == 0
            gate.send(client.user, 61, b"x")
            client.cut()
        await until(lambda: not gate.users)


@pytest.mark.parametrize("forge", ["token", "user", "count"])
async def test_a_session_is_resumed_by_who_knows_it(forge: str) -> None:
    async with gateway() as gate, connected(gate) as client, connected(gate) as thief:
        await client.hello()
        session, count = bytearray(client.session), bytes(8)
        if forge == "token":
            session[-1] ^= 1
        elif forge == "user":
            session[0] ^= 1
        else:
            count = b"\1" + bytes(7)
        await thief.send(RESUME, bytes(session) + count)
        assert await thief.expect(EXPIRED)
        gate.send(client.user, 61, b"mine")
        assert await client.take() == Told(61, b"mine")


async def test_a_resume_of_another_size_is_an_error() -> None:
    async with gateway() as gate, connected(gate) as client:
        await client.send(RESUME, b"x")
        closed = await client.closed()
        assert (closed.code, closed.reason) == (1002, "a RESUME of 1 bytes: 32 are wanted")


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_farewell_ends_the_session(carrier: str) -> None:
    async with gateway() as gate, connected(gate, carrier) as client:
        await client.hello()
        await client.send(6)
        assert (await client.closed()).code == CloseCode.NORMAL
        assert gate.users == frozenset()


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1008, 1009, 4002])
async def test_a_client_that_closes_may_come_back_unless_with_1000(code: int) -> None:
    async with gateway() as gate:
        async with connected(gate) as client:
            await client.hello()
            await client.connection.close(code)  # type: ignore[attr-defined]
        await until(lambda: gate.clients == 0)
        assert gate.users == (frozenset() if code == 1000 else {client.user})


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_session_is_resumed_in_the_turn_in_which_its_connection_is_reset(
    carrier: str,
) -> None:
    async with gateway(grace=5) as gate:
        async with connected(gate, carrier) as first, connected(gate, carrier) as second:
            await first.hello()
            first.cut()
            await second.resume(first.session, 0)
            gate.send(first.user, 61, b"x")
            assert await second.take() == Told(61, b"x")


async def test_a_client_that_is_gone_does_not_hold_up_the_end() -> None:
    gate = gateway_of()
    async with gate:
        async with connected(gate, "tcp") as client:
            await client.hello()
            client.cut()
            await gate.close()


# ---------------------------------------------------------------------------------------- life


async def test_closing_tells_the_clients() -> None:
    async with Node("gate", registry="memory://gate") as node:
        gate = Gateway(node, tcp_port=0)
        await gate.start()
        async with connected(gate) as one, connected(gate, "tcp") as two:
            await one.hello()
            await two.hello()
            await gate.close()
            for client in (one, two):
                closed = await client.closed()
                assert (closed.code, closed.reason) == (1001, "the gateway closes")
        await gate.close()
        with pytest.raises(DomiError, match="closed: make another one"):
            await gate.start()


async def test_a_gateway_starts_its_node_and_closes_it() -> None:
    node = Node("gate", registry="memory://gate")
    async with Gateway(node) as gate:
        assert node.state == "serving"
        assert gate.state == "serving"
    assert node.state == "closed"


async def test_closing_the_node_closes_the_gateway() -> None:
    node = Node("gate", registry="memory://gate")
    await node.start()
    gate = Gateway(node)
    await gate.start()
    await node.close()
    assert gate.state == "closed"
    await gate.wait_closed()


async def test_a_node_has_one_gateway() -> None:
    async with gateway() as gate, zone(gate) as room:
        with pytest.raises(DomiError, match="cannot have this gateway: channel 9 has a handler"):
            await Gateway(gate.node).start()
        async with connected(gate) as client:
            await client.hello()
            await client.write(1, 50)
            assert (await room.message()).group == 1


async def test_a_gateway_that_drains_takes_nobody_and_waits_for_the_others() -> None:
    async with gateway(tcp_port=0) as gate, connected(gate) as client:
        await client.hello()
        draining = asyncio.ensure_future(gate.drain())
        await asyncio.sleep(0)
        async with connected(gate, "tcp") as late:
            await late.send(1)
            closed = await late.closed()
            assert (closed.code, closed.reason) == (1013, "this gateway is draining: use another")
        assert not draining.done()
        await client.send(6)
        await asyncio.wait_for(draining, 5)


async def test_a_connection_that_has_no_session_yet_is_too_late_when_it_drains() -> None:
    async with gateway() as gate, connected(gate) as client, connected(gate, "tcp") as late:
        await client.hello()
        await until(lambda: gate.clients == 2)
        draining = asyncio.ensure_future(gate.drain())
        await asyncio.sleep(0)
        await late.send(1)
        assert (await late.closed()).code == CloseCode.TRY_LATER
        await client.send(6)
        await asyncio.wait_for(draining, 5)


async def test_the_program_ends_a_session() -> None:
    async with gateway() as gate, connected(gate) as client:
        await client.hello()
        assert gate.disconnect(client.user, "you are banned")
        closed = await client.closed()
        assert (closed.code, closed.reason) == (1008, "you are banned")
        assert gate.users == frozenset()
        assert not gate.disconnect(client.user, "again")


async def until_away(gate: Gateway, user: int) -> None:
    """The gateway has noticed that the connection is gone."""
    await until(lambda: gate._sessions.get(user).connection is None)
